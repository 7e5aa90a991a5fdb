// Faults of file systems and clocks for one process, loaded before its other libraries.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { COUNT, KILL, KILL_HALF, FAIL_FROM, FAIL_ONCE, SLOW, FAIL_READS };
static char prefix[4096];
static int mode, error_number;
static long at, delay_us;
static atomic_long operations;
static char watched[1 << 16];
static double clock_start, clock_jump;  // start: seconds of the epoch at which the clock begins, 0 for the true time
static atomic_long readings;
static double begun;

void faults_files(const char *path, int new_mode, long new_at, int number, long delay) {
  strncpy(prefix, path, sizeof prefix - 1);
  mode = new_mode, at = new_at, error_number = number, delay_us = delay;
  atomic_store(&operations, 0);
}
long faults_count(void) { return atomic_load(&operations); }

static int below(const char *path) { return prefix[0] && path && !strncmp(path, prefix, strlen(prefix)); }
static int is_watched(int fd) { return fd >= 0 && fd < (int)sizeof watched && watched[fd]; }

// Counts a changing operation; returns whether it shall fail. `half` is whether half of it can be done.
static int fault(int fd, const void *data, size_t size) {
  long now = atomic_fetch_add(&operations, 1);
  if (mode == SLOW) usleep(delay_us);
  if ((mode == KILL || mode == KILL_HALF) && now == at) {
    if (mode == KILL_HALF && size > 1) syscall(SYS_write, fd, data, size / 2);
    kill(getpid(), SIGKILL);
  }
  if ((mode == FAIL_FROM && now >= at) || (mode == FAIL_ONCE && now == at)) {
    errno = error_number;
    return 1;
  }
  return 0;
}

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, name)

static int opened(int fd, const char *path, int from) {
  if (fd >= 0 && fd < (int)sizeof watched) watched[fd] = below(path) || (path && path[0] != '/' && is_watched(from));
  return fd;
}
#define OPEN(name)                                                             \
  int name(const char *path, int flags, ...) {                                 \
    va_list rest; va_start(rest, flags); mode_t bits = va_arg(rest, mode_t); va_end(rest); \
    REAL(int, #name, const char *, int, ...);                                  \
    if (below(path) && (flags & (O_CREAT | O_TRUNC)) && fault(-1, 0, 0)) return -1; \
    return opened(real(path, flags, bits), path, -1);                          \
  }
OPEN(open)
OPEN(open64)
#define OPENAT(name)                                                           \
  int name(int from, const char *path, int flags, ...) {                       \
    va_list rest; va_start(rest, flags); mode_t bits = va_arg(rest, mode_t); va_end(rest); \
    REAL(int, #name, int, const char *, int, ...);                             \
    return opened(real(from, path, flags, bits), path, from);                  \
  }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t size) {
  REAL(ssize_t, "write", int, const void *, size_t);
  return is_watched(fd) && fault(fd, data, size) ? -1 : real(fd, data, size);
}
#define PWRITE(name)                                                           \
  ssize_t name(int fd, const void *data, size_t size, off_t where) {           \
    REAL(ssize_t, #name, int, const void *, size_t, off_t);                    \
    return is_watched(fd) && fault(fd, data, size) ? -1 : real(fd, data, size, where); \
  }
PWRITE(pwrite)
PWRITE(pwrite64)
ssize_t writev(int fd, const struct iovec *parts, int count) {
  REAL(ssize_t, "writev", int, const struct iovec *, int);
  return is_watched(fd) && fault(fd, count ? parts[0].iov_base : 0, count ? parts[0].iov_len : 0) ? -1 : real(fd, parts, count);
}
#define READ(type, name, params, args, ...)                                    \
  type name params {                                                           \
    REAL(type, #name, __VA_ARGS__);                                            \
    if (is_watched(fd) && mode == SLOW) usleep(delay_us);                      \
    if (is_watched(fd) && mode == FAIL_READS && atomic_fetch_add(&operations, 1) >= at) { errno = error_number; return -1; } \
    return real args;                                                          \
  }
READ(ssize_t, read, (int fd, void *data, size_t size), (fd, data, size), int, void *, size_t)
READ(ssize_t, pread, (int fd, void *data, size_t size, off_t where), (fd, data, size, where), int, void *, size_t, off_t)
READ(ssize_t, pread64, (int fd, void *data, size_t size, off_t where), (fd, data, size, where), int, void *, size_t, off_t)
int fsync(int fd) {
  REAL(int, "fsync", int);
  return is_watched(fd) && fault(-1, 0, 0) ? -1 : real(fd);
}
int fdatasync(int fd) {
  REAL(int, "fdatasync", int);
  return is_watched(fd) && fault(-1, 0, 0) ? -1 : real(fd);
}
int rename(const char *old, const char *new) {
  REAL(int, "rename", const char *, const char *);
  return (below(old) || below(new)) && fault(-1, 0, 0) ? -1 : real(old, new);
}
int unlink(const char *path) {
  REAL(int, "unlink", const char *);
  return below(path) && fault(-1, 0, 0) ? -1 : real(path);
}
int mkdir(const char *path, mode_t bits) {
  REAL(int, "mkdir", const char *, mode_t);
  return below(path) && fault(-1, 0, 0) ? -1 : real(path, bits);
}

static double now(void) {
  struct timespec t;
  syscall(SYS_clock_gettime, CLOCK_REALTIME, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}
void faults_clock(double start, double jump) { begun = now(), clock_start = start, clock_jump = jump; }
static double shifted(void) {
  double time = now();
  if (clock_start) time += clock_start - begun;
  // Forward and backward in turn.
  if (clock_jump) time += (atomic_fetch_add(&readings, 1) % 2 ? -1 : 1) * clock_jump;
  return time;
}
int clock_gettime(clockid_t id, struct timespec *out) {
  if (id != CLOCK_REALTIME || (!clock_start && !clock_jump)) return syscall(SYS_clock_gettime, id, out);
  double time = shifted();
  out->tv_sec = (time_t)time, out->tv_nsec = (long)((time - (time_t)time) * 1e9);
  return 0;
}
time_t time(time_t *out) {
  time_t value = (time_t)shifted();
  if (out) *out = value;
  return value;
}
int gettimeofday(struct timeval *out, void *zone) {
  (void)zone;
  double value = shifted();
  out->tv_sec = (time_t)value, out->tv_usec = (long)((value - (time_t)value) * 1e6);
  return 0;
}
