"""Work over all files of a task by pipelines of Apache Beam, instead of processes of this machine (data/cache/pool.py).

Each call of `pool.run` is a pipeline: its items are distributed, and their results come back through files in the folder of the
caches, which all workers therefore must see. These files are JSON: reading what another has written there runs no code.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pickle
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from espalier.common import pipelines
from espalier.common.pipelines import PipelineError, Step
from espalier.common.storage.result_folder import ResultFolder, together
from espalier.data.cache import cache_dir as directories
from espalier.data.cache import pool


@contextlib.contextmanager
def used(options: Sequence[str], cache_dir: str | os.PathLike | None = None) -> Iterator[None]:
    """Context manager: pipelines with these options do the work of `pool.run`; without options, processes do it.

    Args:
      options: see `pipelines.parsed_options`.
      cache_dir: the root of all caches: a folder that all workers see, or an address of an object store.

    Raises:
      PipelineError: Apache Beam is not installed, or does not know an option.
    """
    if not options:
        yield
        return
    options = pipelines.checked_options(options)
    local = directories.cache_dir("pipelines", override=cache_dir)
    folder = (
        os.path.abspath(local) if (address := directories.address_of(local)) is None else address
    )
    with pool.elsewhere(functools.partial(_run, options, folder)):
        yield


def _run(
    options: Sequence[str],
    folder: str,
    function: Callable[[Any, pool.Report], Any],
    items: Sequence[Any],
    title: str,
    paths: Sequence[str],
    last: Callable[[], None] | None,
) -> list[Any]:
    results = ResultFolder(f"{folder}/{secrets.token_hex(8)}")
    results.make()
    try:
        work = _Work(function, items, results)
        try:
            pickle.dumps(work)
        except Exception as error:  # of any object that a user's module defines
            raise PipelineError(f"{title}: it cannot be sent to workers ({error})") from None
        seen = (*paths, results.path)
        steps = [Step(title, work.do, range(len(items)), seen)]
        if last is not None:
            steps.append(Step(f"{title}: complete", functools.partial(_last, last), [None], seen))
        pipelines.run(
            steps,
            beam_options=options,
            progress=lambda: f"{title}: {len(results.names()):,} of {len(items):,}",
        )
        return together(lambda n: from_json(results.json(f"{n}.json")), range(len(items)))
    finally:
        results.delete()


@dataclasses.dataclass(frozen=True)
class _Work:
    """The items of one pipeline; a worker gets all of them, once, and then their numbers."""

    function: Callable[[Any, pool.Report], Any]
    items: Sequence[Any]
    results: ResultFolder

    def do(self, number: int) -> Mapping[str, int]:
        result = self.function(self.items[number], lambda count: None)
        self.results.write(f"{number}.json", json.dumps(to_json(result)).encode())
        return getattr(result, "sums", {})


def _last(last: Callable[[], None], _: None) -> Mapping[str, int]:
    last()
    return {}


_PLAIN = (bool, int, float, str, type(None))
_BUILT_IN = ("builtins:list", "builtins:tuple", "builtins:dict", "collections:Counter")


def to_json(value: Any) -> Any:
    """Returns a result as JSON: what is not plain is a list of the name of its class and its parts.

    Raises:
      PipelineError: a part is of a class that `from_json` does not make.
    """
    if type(value) in _PLAIN:
        return value
    name = f"{type(value).__module__}:{type(value).__qualname__}"
    _class_of(name)
    parts = value
    if isinstance(value, dict):
        parts = itertools.chain.from_iterable(value.items())
    elif dataclasses.is_dataclass(value):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return [name, *map(to_json, parts)]


def from_json(value: Any) -> Any:
    """Returns the result from the JSON that `to_json` made of it.

    Raises:
      PipelineError: it names a class that is not one of this project's containers.
    """
    if not isinstance(value, list):
        return value
    cls, parts = _class_of(value[0]), [from_json(part) for part in value[1:]]
    if issubclass(cls, dict):
        return cls(dict(zip(parts[::2], parts[1::2], strict=True)))
    has_fields = dataclasses.is_dataclass(cls) or hasattr(cls, "_fields")
    return cls(*parts) if has_fields else cls(parts)


def _class_of(name: str) -> Any:
    """Returns a class that only holds its parts: of Python's, or a named tuple, dataclass, list or dict of this project."""
    module, _, attribute = name.partition(":")
    cls = getattr(sys.modules.get(module), attribute, None)
    if not (
        (name in _BUILT_IN or module.startswith("espalier."))
        and isinstance(cls, type)
        and (issubclass(cls, list | tuple | dict) or dataclasses.is_dataclass(cls))
        and not hasattr(cls, "__post_init__")
    ):
        raise PipelineError(
            f"a result has a part of {name}, which workers do not send back: they send numbers, texts, lists, tuples, dicts, "
            "and this project's own named tuples and dataclasses"
        )
    return cls
