"""Work over all files of a task by pipelines of Apache Beam, in the place of processes of this machine (data/cache/pool.py).

Each call of `pool.run` is a pipeline: its items are distributed, and their results come back through files in the folder of the
caches, which all workers therefore must see.
"""

import contextlib
import dataclasses
import functools
import os
import pickle
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from espalier.common import pipelines
from espalier.common.pipelines import PipelineError, Step
from espalier.common.storage.result_folder import ResultFolder, together
from espalier.data.cache import cache_dir as directories
from espalier.data.cache import pool


@contextlib.contextmanager
def used(options: Sequence[str], cache_dir: str | os.PathLike | None = None) -> Iterator[None]:
    """Context manager: what `pool.run` is given is done by pipelines with these options; without options, as ever.

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
        return together(lambda n: pickle.loads(results.read(f"{n}.pickle")), range(len(items)))
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
        self.results.write(f"{number}.pickle", pickle.dumps(result))
        return getattr(result, "sums", {})


def _last(last: Callable[[], None], _: None) -> Mapping[str, int]:
    last()
    return {}
