"""A profile of a few steps, for TensorBoard or Perfetto."""

import contextlib
from typing import Any

import jax

from espalier.common.ranges import Count, Size


class ProfilerWindow:
    """Traces steps [first_step, first_step + num_steps) into a directory.

    The first steps of a process compile, so by default they are not traced. Steps are counted from the first
    step of this process, also when a run resumes.

    Example: gin `train.train.profile = @profiler.ProfilerWindow()` (after `from espalier.trainers.telemetry import
    profiler`), then TensorBoard's profile tab on the run's `profile/` folder.
    """

    def __init__(self, *, first_step: Count = 5, num_steps: Size = 5, directory: str | None = None):
        """Sets the window; `directory` is by default the run's `profile/`."""
        if first_step < 0 or num_steps < 1:
            raise ValueError(
                f"ProfilerWindow: first_step = {first_step} must not be negative and num_steps = "
                f"{num_steps} must be positive."
            )
        self.first_step = first_step
        self.num_steps = num_steps
        self.directory = directory
        self._done = 0  # steps started in this process
        self._tracing = False

    @contextlib.contextmanager
    def step(self, step: int):
        """Context manager around the dispatch of one step; marks the step and starts the trace when due."""
        if self._done == self.first_step:
            if self.directory is None:
                raise ValueError("ProfilerWindow has no directory to write to.")
            jax.profiler.start_trace(self.directory)
            self._tracing = True
        self._done += 1
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def finished(self, outputs: Any) -> None:
        """Ends the trace after the last traced step; called after each step with its result."""
        if self._tracing and self._done >= self.first_step + self.num_steps:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        """Ends a trace that is still open because the run ended inside the window."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
