"""Checks at the start that the hosts of one run agree: on code, configuration, devices, data, and the run's directory.

Hosts that disagree would hang in the first step, or train on wrong data without a sign. Each process puts facts about
itself into the coordinator's store, and process 0 compares them, so that a pod of a thousand hosts exchanges a thousand
short texts. Every process then raises the same error.
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.launch import environment
from espalier.launch.processes import peers

_KEYS = "espalier/hosts"
_WAIT_MS = (
    15 * 60 * 1000
)  # for hosts that are slower; launch/processes/peers.py ends the wait when one is lost
# A network file system may show a new file late.
_VISIBLE_SECONDS = 60.0
_SHARED_FILE = ".hosts"
_REMEDIES = {
    "code": "put the same files on all hosts: a shared folder, one commit, or one image",
    "packages": "install the same versions on all hosts: the lock file in constraints/, or one image",
    "configuration": "start all processes with the same flags and gin files",
    "devices": "ask for hosts of one kind (SLURM: --constraint; GKE: a node selector)",
    "data": "let all hosts read the same data, vocabulary and preprocessing",
    "ESPALIER_CACHE": "set it to one address on all hosts, or to a folder on all",
    "MODEL_DIR": "give a folder on a file system that all hosts share, or gs://BUCKET/NAME or s3://BUCKET/NAME and credentials on each",
}


class HostsDisagreeError(ValueError):
    """The hosts of a run differ in something that must be the same."""


def check_start(configuration: str) -> None:
    """Compares code, versions, configuration and devices; does nothing for a single process.

    Args:
      configuration: the whole configuration, as text.

    Raises:
      HostsDisagreeError: in every process.
    """
    import jax

    if jax.process_count() == 1:
        return
    local = jax.local_devices()
    check_same(
        "start",
        {
            "code": _code_digest(),
            "packages": _packages(),
            "configuration": configuration,
            "devices": f"{len(local)} {local[0].device_kind}",
            "ESPALIER_CACHE": _cache_address(),
        },
    )


def check_same(stage: str, facts: Mapping[str, str]) -> None:
    """Compares facts of all processes; every process must call it, with the same keys.

    Args:
      stage: a name that is used once in a run.
      facts: texts by the keys of _REMEDIES; all other keys are of data.

    Raises:
      HostsDisagreeError: in every process.
    """
    import jax

    count = jax.process_count()
    if count == 1:
        return
    store, index = peers.store(), jax.process_index()
    own = {"host": platform.node(), **facts}
    store.key_value_set(f"{_KEYS}/{stage}/{index}", json.dumps(own))
    verdict = f"{_KEYS}/{stage}/verdict"
    if index == 0:
        others = [_get(store, f"{_KEYS}/{stage}/{i}") for i in range(1, count)]
        message = difference([own, *map(json.loads, others)])
        store.key_value_set(verdict, json.dumps(message))
    if message := json.loads(_get(store, verdict)):
        raise HostsDisagreeError(message)


def difference(facts: Sequence[Mapping[str, str]]) -> str | None:
    """Returns a sentence on the first difference from process 0; None if there is none."""
    for key in facts[0]:
        if key == "host":
            continue
        others = [i for i, mine in enumerate(facts) if mine.get(key) != facts[0][key]]
        if others:
            i, more = others[0], len(others) - 1
            also = f" (and {more} more)" if more else ""
            mine, theirs = _lines(facts[i].get(key, ""), facts[0][key])
            return (
                f"the hosts of this run differ in their {key}: process {i} on {facts[i]['host']}{also} has "
                f"{mine!r}, process 0 on {facts[0]['host']} has {theirs!r}. Remedy: {_REMEDIES.get(key, _REMEDIES['data'])}."
            )
    return None


def _lines(one: str, other: str) -> tuple[str, str]:
    """Returns the first lines in which two texts differ."""
    first, second = one.splitlines(), other.splitlines()
    for mine, theirs in zip(first, second, strict=False):
        if mine != theirs:
            return mine, theirs
    length = min(len(first), len(second))
    return "".join(first[length : length + 1]), "".join(second[length : length + 1])


def check_shared(path: str) -> None:
    """Checks that all processes see the run's directory; does nothing for a single process.

    Raises:
      HostsDisagreeError: in every process.
    """
    import jax

    from espalier.common.storage import paths

    if jax.process_count() == 1:
        return
    store, file = peers.store(), paths.join(path, _SHARED_FILE)
    if jax.process_index() == 0:
        token = uuid.uuid4().hex
        paths.write(file, token.encode())
        store.key_value_set(f"{_KEYS}/shared", token)
    token = _get(store, f"{_KEYS}/shared")
    seen = f"{path} as process 0 sees it"
    until = time.monotonic() + _VISIBLE_SECONDS
    while not _holds(file, token):
        if time.monotonic() > until:
            seen = f"another folder {path}"
            break
        time.sleep(0.2)
    check_same("shared", {"MODEL_DIR": seen})
    if jax.process_index() == 0:
        paths.delete(file)


def _holds(file: str, token: str) -> bool:
    from espalier.common.storage import paths

    try:
        if not paths.is_remote(file):
            os.listdir(os.path.dirname(file))  # makes network file systems look again
        return paths.read(file) == token.encode()
    except OSError:
        return False


def _cache_address() -> str:
    """Returns the address of the caches in an object store; folders of hosts may differ."""
    cache = os.environ.get("ESPALIER_CACHE") or ""
    return cache.rstrip("/") if "://" in cache else "a folder"


def _get(store: Any, key: str) -> str:
    return store.blocking_key_value_get(key, _WAIT_MS)


def _code_digest() -> str:
    """Returns a digest of the project's Python and gin files."""
    digest, root = hashlib.sha256(), pathlib.Path(environment.IMPORTED_FROM, "espalier")
    for package in ("common", *environment.EARLIER_PACKAGES, "t5x_configs"):
        for file in sorted((root / package).rglob("*")):
            if file.suffix in (".py", ".gin"):
                digest.update(str(file.relative_to(root)).encode() + b"\0")
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _packages() -> str:
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    return ", ".join([f"Python {platform.python_version()}", *versions])
