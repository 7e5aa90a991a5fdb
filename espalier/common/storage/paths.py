"""Addresses of object stores, gs://BUCKET/KEY and s3://BUCKET/KEY: the one place that opens, lists and changes them.

An object store has no folders, no renaming, no appending and no locks. What the project relies on instead:

  replacing    an object is written whole; readers see the old one or the new one
  committing   many objects are complete once a marker, which is written last, is there
  locking      espalier/common/storage/lock.py, by creating an object only if it is not there
  growing      files that grow are written here and copied whole, espalier/common/storage/mirror.py
  listing      is consistent (both stores promise it since 2020); listings are not cached

Stores are reached through fsspec (gcsfs, s3fs), as by Orbax and TFDS, and arrays through TensorStore. Nothing is imported
for paths of this machine. Credentials come from the environment and the files of the stores' own tools, never from here.
"""

import contextlib
import dataclasses
import functools
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import Any

# Package by scheme, which is also the name of the extra that installs it.
_PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
SCHEMES = tuple(f"{scheme}://" for scheme in _PACKAGES)
EMULATOR = "STORAGE_EMULATOR_HOST"  # of gcsfs: another server than Google's
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
_RETRIES = 12  # of one request for parts of arrays, with growing pauses: about two minutes

_REFUSED = (
    "accessdenied",
    "forbidden",
    "invalidaccesskeyid",
    "signaturedoesnotmatch",
    "permission",
)
_REFUSED_STATUS = r"(?<![\w/.-])40[13](?![\w/-])"  # of HTTP; not a part of a key
_NO_CREDENTIALS = ("credentials", "reauthentication")
_REMEDIES = {
    "gs": "gcloud auth application-default login, GOOGLE_APPLICATION_CREDENTIALS=FILE, or the machine's service account",
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role",
}  # fmt: skip


class StoreError(OSError):
    """An object store that refuses, cannot be reached, or does not have the bucket; or an address that is none."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """An object of a listing: its size in bytes, and a text that changes whenever its content does."""

    size: int
    version: str


def is_remote(path: str | os.PathLike) -> bool:
    """Returns whether a path is an address of an object store."""
    return os.fspath(path).startswith(SCHEMES)


def join(path: str | os.PathLike, *names: str) -> str:
    """Returns a path below a folder or an address."""
    path = os.fspath(path)
    return posixpath.join(path, *names) if is_remote(path) else os.path.join(path, *names)


def absolute(path: str | os.PathLike) -> str:
    """Returns an absolute path, or the address in its plain form; raises StoreError as `split`."""
    path = os.fspath(path)
    if not is_remote(path):
        return os.path.abspath(path)
    scheme, bucket, key = split(path)
    return f"{scheme}://{bucket}/{key}".rstrip("/")


def split(address: str) -> tuple[str, str, str]:
    """Returns scheme, bucket and key.

    Raises:
      StoreError: there is no bucket, the key has empty or dotted parts, or the address has credentials in it.
    """
    scheme, _, rest = address.partition("://")
    bucket, _, key = rest.partition("/")
    if "@" in bucket or "?" in address:
        raise StoreError(
            f"{scheme}://...: an address must not have credentials or parameters in it, because it is recorded with the run. "
            f"Give {scheme}://BUCKET/KEY, and credentials by {_REMEDIES[scheme]}."
        )
    key = key.strip("/")
    if not bucket or any(part in ("", ".", "..") for part in key.split("/") if key):
        raise StoreError(f"{address!r} is no address: give {scheme}://BUCKET/KEY.")
    return scheme, bucket, key


def as_path(path: str | os.PathLike) -> str:
    """Returns a path by which an address or a path is named relative to others: of an address /SCHEME/BUCKET/KEY."""
    return os.path.join("/", *split(absolute(path))) if is_remote(path) else os.fspath(path)


def filesystem(address: str) -> Any:
    """Returns the fsspec file system of an address; raises StoreError if its package is not installed."""
    return _filesystem(split(address)[0])


@functools.cache
def _filesystem(scheme: str) -> Any:
    # epath would use TensorFlow's own client, which is slow to import and has none for s3. It decides this at its first use,
    # which may have been of a path of this machine.
    os.environ.setdefault("EPATH_USE_TF", "0")
    from etils.epath import gpath

    gpath._is_tf_installed.cache_clear()
    if emulator := os.environ.get(EMULATOR):
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
        os.environ.setdefault(
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false"
        )  # asks Google about buckets
    package, extra = _PACKAGES[scheme]
    import fsspec

    for protocol in (scheme, package.removesuffix("fs")):
        # Other hosts write too.
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    try:
        return fsspec.filesystem(scheme)
    except ImportError:
        raise StoreError(
            f"{scheme}:// needs the package {package}, which is not installed: pip install -e '.[{extra}]'."
        ) from None
    except Exception as error:
        raise _error(f"{scheme}://", error) from error


@contextlib.contextmanager
def reporting(address: str) -> Iterator[None]:
    """Context manager that turns the errors of a store's client into one StoreError; a missing object is FileNotFoundError."""
    try:
        yield
    except (FileExistsError, StoreError):
        raise
    except FileNotFoundError as error:
        if "specified bucket does not exist" in str(error):
            raise _no_bucket(address) from error
        raise
    except Exception as error:
        if (
            isinstance(error, OSError)
            and isinstance(error.filename, str)
            and os.path.isabs(error.filename)
        ):
            raise  # of this machine's disk
        raise _error(address, error) from error


def _no_bucket(address: str) -> StoreError:
    scheme, bucket, _ = split(address)
    return StoreError(
        f"{address}: there is no bucket {bucket!r} in {scheme}://. Create it, or correct the address."
    )


def _error(address: str, error: Exception) -> StoreError:
    scheme = address.partition("://")[0]
    # The addresses in messages may have signatures in their parameters.
    text = re.sub(r"\?\S+", "?...", (str(error).splitlines() or [""])[0])[:200]
    reason = f"{type(error).__name__}: {text}".rstrip(": ")
    lower = re.sub(r"\w+://[^\s<>'\"]+", "", reason.lower())  # keys may hold any words
    if any(word in lower for word in _NO_CREDENTIALS):
        return StoreError(
            f"{address}: there are no credentials ({reason}). Give them by {_REMEDIES[scheme]}."
        )
    if any(word in lower for word in _REFUSED) or re.search(_REFUSED_STATUS, lower):
        return StoreError(
            f"{address}: the store refuses ({reason}). Let these credentials list, read, write and delete in the bucket, or "
            f"use others: {_REMEDIES[scheme]}."
        )
    return StoreError(
        f"{address}: the store failed or cannot be reached ({reason}). Start again once it answers."
    )


def entries(address: str, beginning: str = "") -> dict[str, Entry]:
    """Returns the objects below an address by their names relative to it, those that begin so; empty if there are none.

    Raises:
      StoreError: there is no such bucket, or it refuses.
    """
    address = absolute(address)
    scheme, bucket, key = split(address)
    base = f"{bucket}/{key}".rstrip("/") + "/"
    with reporting(address):
        try:
            objects: Mapping[str, Any] = filesystem(address).find(
                base, detail=True, withdirs=False, prefix=beginning
            )
        except FileNotFoundError:
            if not _has_bucket(address):
                raise _no_bucket(address) from None
            objects = {}
    if not objects and not _has_bucket(address):
        raise _no_bucket(address)
    return {
        name.removeprefix(base): Entry(int(info["size"] or 0), _version(info))
        for name, info in sorted(objects.items())
        if name.startswith(base + beginning) and name != base and not name.endswith("/")
    }


def _has_bucket(address: str) -> bool:
    """Returns whether an empty listing is of a bucket that exists."""
    scheme, bucket, _ = split(address)
    store = filesystem(address)
    with reporting(address):
        try:
            if scheme == "s3":
                store.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
            else:  # needs no right but that to list
                store.call("GET", "b/{}/o", bucket, maxResults=1, json_out=True)
        except FileNotFoundError:
            return False
    return True


def _version(info: Mapping[str, Any]) -> str:
    versions = (info.get(key) for key in ("generation", "ETag", "etag", "md5Hash", "LastModified"))
    return str(next((value for value in versions if value), ""))


def entry(address: str) -> Entry:
    """Returns the size and version of one object; raises FileNotFoundError if there is none, and StoreError."""
    with reporting(address):
        info = filesystem(address).info(address)
    return Entry(int(info["size"] or 0), _version(info))


def exists(path: str | os.PathLike) -> bool:
    """Returns whether there is an object with this address; for a path of this machine, os.path.lexists."""
    path = os.fspath(path)
    if not is_remote(path):
        return os.path.lexists(path)
    with reporting(path):
        return filesystem(path).isfile(path)


def read(address: str | os.PathLike) -> bytes:
    """Returns the content of an object or file; raises FileNotFoundError if there is none, and StoreError."""
    address = os.fspath(address)
    if not is_remote(address):
        with open(address, "rb") as file:
            return file.read()
    with reporting(address):
        return filesystem(address).cat_file(address)


def names(address: str) -> list[str]:
    """Returns the names of the objects and folders directly below an address; empty without any."""
    address = absolute(address)
    with reporting(address):
        try:
            found = filesystem(address).ls(address, detail=False)
        except FileNotFoundError:
            if not _has_bucket(address):
                raise _no_bucket(address) from None
            return []
    return sorted(posixpath.basename(name.rstrip("/")) for name in found)


def write(address: str, data: bytes) -> None:
    """Writes an object whole, or a file; raises StoreError."""
    if not is_remote(address):
        with open(address, "wb") as file:
            file.write(data)
        return
    create(address, data, mode="overwrite")


def create(address: str, data: bytes, *, mode: str = "create") -> bool:
    """Writes an object only if there is none; returns whether it did. Of several callers at once, one succeeds."""
    with reporting(address):
        try:
            filesystem(address).pipe_file(address, data, mode=mode)
        except FileExistsError:
            return False
        except FileNotFoundError:
            raise _no_bucket(address) from None
    return True


def delete(*addresses: str) -> None:
    """Deletes objects or files, in this order; those that are not there are ignored."""
    for address in addresses:
        with contextlib.suppress(FileNotFoundError):
            if not is_remote(address):
                os.unlink(address)
                continue
            with reporting(address):
                filesystem(address).rm_file(address)


def copy_tree(address: str, target: str, *, last: str) -> None:
    """Copies all objects below an address within the store; the object `last`, which completes the copy, comes last."""
    names = [name for name in entries(address) if name != last]
    with reporting(address):
        store = filesystem(address)
        for name in [*names, *([last] if exists(join(address, last)) else [])]:
            store.cp_file(join(address, name), join(target, name))


def matches(pattern: str) -> dict[str, Entry]:
    """Returns the objects that match a glob (`**` includes folders), by their addresses, sorted."""
    pattern = absolute(pattern)
    scheme, bucket, _ = split(pattern)
    if re.search(r"[*?\[]", bucket):
        raise StoreError(f"{pattern!r}: a bucket's name must be written out.")
    with reporting(pattern):
        found = filesystem(pattern).glob(pattern, detail=True)
    objects = {
        f"{scheme}://{name}": Entry(int(info["size"] or 0), _version(info))
        for name, info in sorted(found.items())
        if info["type"] == "file"
    }
    if not objects and not _has_bucket(pattern):
        raise _no_bucket(pattern)
    return objects


def kvstore(path: str | os.PathLike) -> dict[str, Any]:
    """Returns TensorStore's specification of a folder or an address."""
    path = os.fspath(path)
    if not is_remote(path):
        return {"driver": "file", "path": f"{path.rstrip('/')}/"}
    filesystem(path)
    scheme, bucket, key = split(path)
    if scheme == "gs":
        driver = os.environ.get("TENSORSTORE_GCS_BACKEND", "gcs")
        return {"driver": driver, "bucket": bucket, "path": f"{key}/"}
    retries = {"max_retries": _RETRIES}
    spec: dict[str, Any] = {
        "driver": "s3",
        "bucket": bucket,
        "path": f"{key}/",
        "s3_request_retries": retries,
    }
    for name, variables in (("endpoint", _ENDPOINTS), ("aws_region", _REGIONS)):
        if value := next(filter(None, map(os.environ.get, variables)), None):
            spec[name] = value
    if os.environ.get(
        "AWS_ACCESS_KEY_ID"
    ):  # else it looks for files and roles, with a message for each missing one
        spec["aws_credentials"] = {"type": "environment"}
    return spec
