"""The thread that owns the model: it continues prompts of many requests, a batch at a time, by the decoder of `generate`.

Completions wait in one queue, in the order of their arrival. Each has its own seed, temperature, top_p, stops and
length, so that completions of different requests share a batch, and no request compiles a program for its settings: there
is one program for each of a few prompt lengths, batch sizes and lengths of new text.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from espalier.launch.inference.generate import LOOK_AT_STOPS, LOOK_AT_STREAM, decoder_for
from espalier.launch.inference.texts import Texts, decoder_of
from espalier.launch.load.load_run import LoadedRun, RunConfig
from espalier.launch.serve.requests import Limits
from espalier.trainers.decoding.buckets import bucket_length
from espalier.trainers.decoding.decoder import Continuation, Decoder
from espalier.trainers.decoding.settings import Draw, Settings

_log = logging.getLogger(__name__)

# Seconds to wait for further completions before an idle engine starts a batch: clients send several at once.
_GATHER_S = 0.005
_SHORTEST = 32  # new tokens of the smallest program


class BusyError(RuntimeError):
    """The queue is full, or the server ends."""


class FailedError(RuntimeError):
    """A batch failed for a reason that is not in its requests; the log has it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completed:
    """A finished completion.

    Attributes:
      text: its text; empty without a vocabulary.
      ended: "eos", "stop" or "length".
      tokens, log_probs: see `Continuation`.
    """

    text: str
    ended: str
    tokens: Sequence[int]
    log_probs: Sequence[float]


class Job:
    """One completion of one prompt; `future` gets its `Completed`.

    Args:
      prompt: tokens that the model reads.
      max_tokens: maximum number of new tokens.
      draw: seed and sampling.
      stops: texts that end the completion.
      show: called, in the engine's thread, with text as soon as it is final; None to wait for the end.
      deadline: time (`time.monotonic`) from which nobody waits.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        draw: Draw,
        stops: Sequence[str] = (),
        show: Callable[[str], None] | None = None,
        deadline: float = math.inf,
    ):
        self.prompt, self.max_tokens, self.draw = prompt, max_tokens, draw
        self.stops, self.show, self.deadline = stops, show, deadline
        self.future: concurrent.futures.Future[Completed] = concurrent.futures.Future()
        self._texts: Texts | None = None
        self._seen = 0
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more; a client that does not read its stream is not waited for either."""
        return self._cancelled or time.monotonic() >= self.deadline

    def cancel(self) -> None:
        """Ends the completion at the next look at its tokens; nobody waits for it."""
        self._cancelled = True

    def begin(self, decode: Callable[[Sequence[int]], str] | None, ends: Sequence[int]) -> None:
        """Prepares the texts; called before the first `watch`. The future cannot be cancelled any more."""
        if not self.future.set_running_or_notify_cancel():
            self.cancel()
        self._texts = Texts(decode, ends=ends, stops=self.stops, show=self.show)

    def watch(self, tokens: Sequence[int]) -> int | None:
        """Returns the number of new tokens after which the completion ends, or None."""
        assert self._texts is not None
        if self.cancelled:
            return 0
        within = tokens[: self.max_tokens - self._seen]
        stopped = self._texts.watch(0, 0, within)
        if stopped is not None:
            return stopped
        self._seen += len(within)
        return len(within) if self._seen >= self.max_tokens else None

    def finish(self, new: Continuation) -> None:
        """Sets the result, unless the job has failed."""
        if self.cancelled:
            return
        assert self._texts is not None
        answer = self._texts.answer({"tokens": ()}, 0, 0, new)
        completed = Completed(
            text=answer.get("text", ""),
            ended=answer["ended"],
            tokens=new.tokens,
            log_probs=new.log_probs,
        )
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # it has failed
            self.future.set_result(completed)

    def fail(self, error: Exception) -> None:
        """Sets an error, unless there is a result, or nobody waits."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self.future.set_exception(error)


def _length(jobs: Sequence[Job]) -> int:
    """Returns the number of positions of a batch; the last new token is never read."""
    return max(len(job.prompt) for job in jobs) + max(job.max_tokens for job in jobs) - 1


class Engine:
    """Continues prompts with a run's model in a thread of its own; a context manager.

    Entering it loads the model; `loaded` is then the run, whose vocabulary and chat template other threads may use.

    Args:
      config: configuration of the run.
      checkpoint, params: see launch/load/load_run.py.
      limits: of the server.
      options: `cache_dtype`, `prefill_chunk` and `policy` of `generate`.

    Raises:
      LoadError, DamagedCheckpointError and others of `RunConfig.load`, on entering.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        checkpoint: str,
        params: str = "auto",
        limits: Limits,
        **options: Any,
    ):
        self._config, self._checkpoint, self._params = config, checkpoint, params
        self._limits, self._options = limits, options
        self._changed = threading.Condition()
        self._waiting: collections.deque[Job] = collections.deque()
        self._batch: Sequence[Job] = ()
        self._closed = False
        self._decoders: dict[tuple[int, int], Decoder] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._ready: concurrent.futures.Future[LoadedRun] = concurrent.futures.Future()

    def __enter__(self) -> "Engine":
        self._thread.start()
        self._ready.result()
        return self

    @property
    def loaded(self) -> LoadedRun:
        """The run, once its parameters are loaded."""
        return self._ready.result()

    def __exit__(self, *_: Any) -> None:
        """Ends the thread; completions in progress are ended, and all of them fail."""
        with self._changed:
            self._closed = True
            for job in (*self._waiting, *self._batch):
                job.fail(BusyError("The server is shutting down."))
                job.cancel()
            self._changed.notify()
        self._thread.join()

    @property
    def longest_position(self) -> int | None:
        """The number of positions that the model has learned; None for no limit."""
        return self.loaded.model.max_length

    def submit(self, jobs: Sequence[Job]) -> None:
        """Adds completions to the queue.

        Raises:
          BusyError: the queue has no room for all of them, or the server ends.
        """
        with self._changed:
            if self._closed:
                raise BusyError("The server is shutting down.")
            if len(self._waiting) + len(jobs) > self._limits.max_queue:
                raise BusyError(
                    f"{len(self._waiting)} completions are waiting, of {self._limits.max_queue} at most. Try again later."
                )
            self._waiting.extend(jobs)
            self._changed.notify()

    def _run(self) -> None:
        try:
            options: dict[str, Any] = {"params": self._params, "encoder_decoders": True}
            with self._config.load(self._checkpoint, **options) as loaded:
                loaded.unroll()  # once for all decoders
                vocabulary = loaded.vocabulary_or_none
                self._decode = None if vocabulary is None else decoder_of(vocabulary)
                self._ready.set_result(loaded)
                while (jobs := self._next()) is not None:
                    self._continue(jobs)
        except BaseException as error:
            if self._ready.done():
                raise
            self._ready.set_exception(error)

    def _next(self) -> Sequence[Job] | None:
        """Waits for completions and returns a batch of them; None when the engine is closed."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            if len(self._waiting) < self._limits.batch_size:
                self._changed.wait_for(
                    lambda: self._closed or len(self._waiting) >= self._limits.batch_size,
                    timeout=_GATHER_S,
                )
            jobs: list[Job] = []
            while self._waiting and len(jobs) < self._limits.batch_size:
                if self._waiting[0].cancelled:
                    self._waiting.popleft()
                elif jobs and not self._fit([*jobs, self._waiting[0]]):
                    break
                else:
                    jobs.append(self._waiting.popleft())
            self._batch = jobs
        return jobs

    def _fit(self, jobs: Sequence[Job]) -> bool:
        """Returns whether a batch of these stays within the positions that the model has learned."""
        learned = self.loaded.model.max_length
        return learned is None or _length(jobs) <= learned

    def _continue(self, jobs: Sequence[Job]) -> None:
        try:
            for job in jobs:
                job.begin(self._decode, self.loaded.eos_ids)
            decoder = self._decoder(jobs)
            streams = any(job.show is not None for job in jobs)
            decoder.watch_every = LOOK_AT_STREAM if streams else LOOK_AT_STOPS
            draws = [job.draw for job in jobs]
            for _ in decoder.stream([job.prompt for job in jobs], draws=draws):
                pass
        except ValueError as error:  # such as caches that are too large
            for job in jobs:
                job.fail(error)
        except Exception:  # one batch must not end the server
            _log.exception("A batch of %d completions failed.", len(jobs))
            for job in jobs:
                job.fail(FailedError("The model failed; the server's log says why."))
        finally:
            self._batch = ()

    def _decoder(self, jobs: Sequence[Job]) -> Decoder:
        """Returns the decoder for a batch: of few sizes, since each compiles its programs."""
        wanted = max(job.max_tokens for job in jobs)
        tokens = min(bucket_length(max(wanted, _SHORTEST)), self._limits.max_tokens)
        learned = self.loaded.model.max_length
        if learned is not None and _length(jobs) - wanted + tokens > learned:
            tokens = wanted
        # Batches of more than one completion are padded to the full size.
        size = 1 if len(jobs) == 1 else self._limits.batch_size
        rows = self.loaded.batch_size(size, size)
        if (rows, tokens) not in self._decoders:
            self._decoders[rows, tokens] = decoder_for(
                self.loaded,
                Settings(max_new_tokens=tokens),
                batch_size=rows,
                watch=lambda i, _, new: self._batch[i].watch(new),
                ended=lambda i, _, new: self._batch[i].finish(new),
                **self._options,
            )
        return self._decoders[rows, tokens]
