"""Compiles the train step while the run prepares its state: neither has to wait for the other."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from trainers import partitioning
from trainers.recipe import Program


@contextlib.contextmanager
def compiling(program: Program, train_step: Any, batch: Any) -> Iterator[None]:
    """Compiles in a thread while the body runs, and waits for it at the end.

    jax keeps the program, so that the first call of `train_step` neither traces nor compiles.

    Args:
      program: whose mesh, rules and state the step is for.
      train_step: the jitted step.
      batch: shapes, dtypes and shardings of a batch.

    Raises:
      Exception: whatever compiling raised, once the body is done.
    """
    failed: list[BaseException] = []

    def compile_step() -> None:
        try:
            # The mesh in use is a thread's own.
            with partitioning.use_mesh(program.mesh, program.rules):
                train_step.lower(program.abstract_state, batch).compile()
        except BaseException as error:  # raised where it is waited for
            failed.append(error)

    thread = threading.Thread(target=compile_step, name="compile")
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if failed:
        raise failed[0]
