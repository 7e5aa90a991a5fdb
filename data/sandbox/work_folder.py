"""Removes the folders of untrusted programs, at any depth and with any names, sizes and permissions."""

import os
import stat
import time


def remove(path: str, *, seconds: float = float("inf")) -> bool:
    """Removes a folder that no process uses, and everything in it; returns whether nothing remains.

    Links are removed, not followed. What cannot be removed remains; no OSError is raised.

    Args:
      path: the folder; it may be missing.
      seconds: time after which to stop.
    """
    try:
        tree = _Tree(path, time.monotonic() + seconds)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        tree.remove_files()
        while tree.below or tree.folders[0]:
            if tree.folders[-1]:
                tree.enter(tree.folders[-1].pop())
            else:
                tree.leave()
        os.rmdir(path)
    except OSError:
        return False
    finally:
        os.close(tree.here)
    return not tree.left


class _Tree:
    """A walk over folders that removes what it passes.

    Only the present folder is open and all steps are relative to it: any depth needs neither recursion, nor long paths,
    nor many descriptors.

    Attributes:
      here: descriptor of the present folder.
      below: names of the folders from the top to the present one, without the top.
      folders: names of the folders still to enter, in the top and in each folder of `below`.
      left: whether something could not be removed.
    """

    def __init__(self, path: str, deadline: float):
        self._deadline = deadline
        self.below: list[str] = []
        self.folders: list[list[str]] = []
        self.left = False
        self.here = self._open(path, None)

    def enter(self, name: str) -> None:
        """Goes into a folder of the present one and removes its files."""
        try:
            inner = self._open(name, self.here)
        except OSError:
            self.left = True
            return
        os.close(self.here)
        self.here = inner
        self.below.append(name)
        self.remove_files()

    def leave(self) -> None:
        """Goes back to the folder above and removes the present one."""
        outer = os.open("..", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.here)
        os.close(self.here)
        self.here = outer
        self.folders.pop()
        self._remove(os.rmdir, self.below.pop())

    def remove_files(self) -> None:
        """Removes the files of the present folder, and lists its folders."""
        folders = []
        for name in os.listdir(self.here):
            if time.monotonic() > self._deadline:
                raise TimeoutError
            if stat.S_ISDIR(os.stat(name, dir_fd=self.here, follow_symlinks=False).st_mode):
                folders.append(name)
            else:
                self._remove(os.unlink, name)
        self.folders.append(folders)

    def _remove(self, function, name: str) -> None:
        try:
            function(name, dir_fd=self.here)
        except OSError:
            self.left = True

    def _open(self, path: str, parent: int | None) -> int:
        os.chmod(path, 0o700, dir_fd=parent)  # it may be without permissions
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
