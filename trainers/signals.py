"""Stopping on request: a signal sets a flag; the loop polls it, saves and returns.

All processes must stop after the same step, although the signal reaches them at different moments, or
only one of them. JAX's preemption service agrees on that step in the background, without work for the
devices; without the service, the processes compare their flags every few steps.
"""

import logging
import signal
import types
from typing import Any

import jax
from jax.experimental import multihost_utils

from espalier.trainers.checkpoints import agreement

_log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
COMPARE_EVERY = (
    20  # steps between comparisons of the processes' flags, without JAX's preemption service
)


class StopRequest:
    """A context in which a signal asks the loop to stop after the current step.

    The first SIGTERM or SIGINT (Ctrl-C) sets the flag; a second one has its usual effect, so that a run that hangs can
    still be ended. Use: `with StopRequest() as stop: ... stop.reached(step)`.
    """

    def __init__(self):
        self._requested = False
        self._previous: dict[signal.Signals, Any] = {}
        several = jax.process_count() > 1
        # The service listens to the signal itself; our handler would replace its own.
        self._service = several and bool(
            getattr(jax.config, "jax_enable_preemption_service", False)
        )

    def request(self) -> None:
        """Asks for a stop, as the signal does."""
        if self._service:
            signal.raise_signal(signal.SIGTERM)
        self._requested = True

    def reached(self, step: int) -> bool:
        """Whether to stop now. Every process calls it after every step; all get the same answer."""
        if self._service:
            return multihost_utils.reached_preemption_sync_point(step)
        if jax.process_count() > 1:
            return step % COMPARE_EVERY == 0 and any(agreement.gather(self._requested))
        return self._requested

    def requested(self, count: int) -> bool:
        """Whether to interrupt long work between two updates, such as an evaluation.

        Every process calls it with the same count of its work; all get the same answer. The preemption service agrees on
        updates only: with it, such work is finished.
        """
        return not self._service and self.reached(count)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        del frame
        self._requested = True
        _log.warning("%s: stopping after this step.", signal.Signals(number).name)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            # None: the handler was not set from Python and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def __enter__(self) -> "StopRequest":
        if not self._service:  # Handlers can be set in the main thread only.
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self._service:
            self._restore()
