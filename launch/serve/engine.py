"""The thread that owns the model: it continues prompts of many requests in one running batch.

Completions wait in one queue, in the order of their arrival, until there is a free row in the batch. Each has its own seed,
temperature, top_p, stops and length, so that completions of different requests share a batch, and no request compiles a
program for its settings (trainers/decoding/running.py).
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from espalier.launch.inference.generate import LOOK_AT_STOPS, LOOK_AT_STREAM, decoder_for
from espalier.launch.inference.texts import Texts, decoder_of
from espalier.launch.load.load_run import LoadedRun, RunConfig
from espalier.launch.serve.requests import Limits
from espalier.trainers.decoding.decoder import Continuation
from espalier.trainers.decoding.prefill import TooLargeError
from espalier.trainers.decoding.running import News, RunningBatch
from espalier.trainers.decoding.settings import Draw, Settings

_log = logging.getLogger(__name__)

# Seconds to wait for further completions before an idle engine begins: clients send several at once.
_GATHER_S = 0.005


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
        self._new = Continuation(tokens=[], log_probs=[])
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more; a client that does not read its stream is not waited for either."""
        return self._cancelled or time.monotonic() >= self.deadline

    def cancel(self) -> None:
        """Ends the completion at the next look at its tokens; nobody waits for it."""
        self._cancelled = True

    def begin(self, decode: Callable[[Sequence[int]], str] | None, ends: Sequence[int]) -> None:
        """Prepares the texts; called before the first `add`. The future cannot be cancelled any more."""
        if not self.future.set_running_or_notify_cancel():
            self.cancel()
        self._texts = Texts(decode, ends=ends, stops=self.stops, show=self.show)

    def add(self, news: News) -> bool:
        """Adds new tokens; returns whether the completion has ended. It then has its result, unless it was cancelled."""
        assert self._texts is not None
        if self.cancelled:
            return True
        new = self._new
        count = self._texts.watch(0, 0, news.tokens)
        new.tokens.extend(news.tokens[:count])
        new.log_probs.extend(news.log_probs[:count])
        if count is None and not news.ended:
            return False
        answer = self._texts.answer({"tokens": ()}, 0, 0, new)
        completed = Completed(
            text=answer.get("text", ""),
            ended=answer["ended"],
            tokens=new.tokens,
            log_probs=new.log_probs,
        )
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # it has failed
            self.future.set_result(completed)
        return True

    def fail(self, error: Exception) -> None:
        """Sets an error, unless there is a result, or nobody waits."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self.future.set_exception(error)


class Engine:
    """Continues prompts with a run's model in a thread of its own; a context manager.

    Entering it loads the model; `loaded` is then the run, whose vocabulary and chat template other threads may use.

    Args:
      config: configuration of the run.
      checkpoint, params: see launch/load/load_run.py.
      limits: of the server.
      options: `cache_dtype`, `prefill_chunk`, `prefix_bytes` and `policy` of `RunningBatch`.

    Attributes:
      batch: the running batch, once the model is loaded; only the engine's thread changes it.

    Raises:
      LoadError, DamagedCheckpointError and others of `RunConfig.load`, and errors of `RunningBatch`, on entering.
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
        self._jobs: list[Job] = []  # in the batch, or next to be
        self._closed = False
        self.batch: RunningBatch
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
            for job in (*self._waiting, *self._jobs):
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
                waited_for = (job for job in self._waiting if not job.cancelled)
                self._waiting = collections.deque(waited_for)
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
                self.batch = self._made(loaded)
                self._ready.set_result(loaded)
                while self._take():
                    self._continue()
        except BaseException as error:
            if self._ready.done():
                raise
            self._ready.set_exception(error)

    def _made(self, loaded: LoadedRun) -> RunningBatch:
        limits, learned = self._limits, loaded.model.max_length
        most = limits.batch_size
        longest = limits.max_prompt_tokens + limits.max_tokens - 1
        return decoder_for(
            loaded,
            Settings(max_new_tokens=limits.max_tokens),
            made=RunningBatch,
            # One completion by itself takes less time in a batch of its own.
            sizes=sorted({loaded.batch_size(1, 1), loaded.batch_size(most, most)}),
            longest=longest if learned is None else min(longest, learned),
            most_steps=LOOK_AT_STOPS,
            **self._options,
        )

    def _take(self) -> bool:
        """Takes completions from the queue while there are free rows, or waits for one; returns False when the engine is closed."""
        with self._changed:
            if not self._jobs:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if len(self._waiting) < self._limits.batch_size:
                    self._changed.wait_for(
                        lambda: self._closed or len(self._waiting) >= self._limits.batch_size,
                        timeout=_GATHER_S,
                    )
            if self._closed:
                return False
            taken = self._jobs[:]
            while self._waiting and len(taken) < self._limits.batch_size:
                if (job := self._waiting.popleft()).cancelled:
                    continue
                taken.append(job)
            new = taken[len(self._jobs) :]
            self._jobs = taken
        for job in new:
            self._join(job)
        return True

    def _join(self, job: Job) -> None:
        with self._failing(job):
            job.begin(self._decode, self.loaded.eos_ids)
            if job.cancelled:
                self._jobs.remove(job)
                return
            options = {"together": len(self._jobs), "between": self._continue}
            news = self.batch.join(job, job.prompt, job.draw, job.max_tokens, **options)
            self._add(job, news)

    def _continue(self) -> None:
        """Continues all completions that have joined by a few tokens."""
        every = LOOK_AT_STREAM if any(job.show for job in self._jobs) else LOOK_AT_STOPS
        joined = self.batch.keys
        with self._failing(*joined):
            news = self.batch.advance(every, leave=bool(self._waiting))
            for job in joined:
                with self._failing(job):
                    self._add(job, news[job])

    def _add(self, job: Job, news: News) -> None:
        if job.add(news):
            self._jobs.remove(job)
            if not news.ended:
                self.batch.leave(job)

    @contextlib.contextmanager
    def _failing(self, *jobs: Job) -> Iterator[None]:
        """Context manager: an error ends these completions, and not the server."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, TooLargeError):
                _log.exception("%d completions failed.", len(jobs))
                error = FailedError("The model failed; the server's log says why.")
            elif set(self.batch.keys) - set(jobs):
                error = BusyError(str(error))  # it may have room when these have ended
            for job in jobs:
                job.fail(error)
                self._jobs.remove(job)
                if job in self.batch.keys:
                    self.batch.leave(job)
