"""A bar over the batches of an evaluation, shown if it takes long; a request to stop is heard between two of them."""

import contextlib
import itertools
from collections.abc import Callable, Iterator

import jax
from tqdm.auto import tqdm

from trainers.hooks import GivenUpError

_QUIET_SECONDS = 10


@contextlib.contextmanager
def progress(
    batches: int, name: str, give_up: Callable[[int], bool]
) -> Iterator[Callable[[], None]]:
    """Gives what is to be called after each batch.

    Args:
      batches: how many there are.
      name: of the work.
      give_up: see `RunContext`.

    Raises:
      GivenUpError: after a batch, where `give_up` says so.
    """
    with tqdm(
        total=batches,
        desc=name,
        unit="batch",
        leave=False,
        delay=_QUIET_SECONDS,
        disable=jax.process_index() != 0,
    ) as bar:
        counted = itertools.count(1)  # a bar that is not shown does not count

        def done() -> None:
            bar.update()
            if give_up(next(counted)):
                raise GivenUpError(f"{name} given up")

        yield done
