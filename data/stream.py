"""The training and evaluation streams: batches as a pure function of (seed, step).

    SeqIO task -> token cache -> row plan -> schedule -> order -> batch(step, lo, hi)

Any step is found by arithmetic, whatever was read before. Hosts ask for the rows of the global
batch that they need, so neither their number nor the mesh changes what a batch holds, and the whole
state of a stream is the step.
"""

import abc
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data import cache, mixing, order, plan, repeats, rows, schedule

# Part of every fingerprint: raise it when the same settings begin to give other batches.
_VERSION = 1

Phases = Sequence[tuple[int, Mapping[str, float]]]
# Source -> {'rows': read so far, 'order': digest of the order they lie in}.
Positions = Mapping[str, Mapping[str, Any]]


class NoSplitError(ValueError):
    """A task has no such split, as where no document is held out."""


def make_stream(
    *,
    mixture_or_task_name: str,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    seed: int = 0,
    split: str = "train",
    weights: mixing.Weights = "rates",
    temperature: float = 1.0,
    max_tokens: int | None = None,
    phases: Phases | None = None,
    interleaving: schedule.Interleaving = "error_diffusion",
    packing: plan.Packing = "best_fit",
    long_documents: plan.LongDocuments = "split",
    cross_document_attention: bool = False,
    start_token: int = 0,
    max_epochs: repeats.MaxEpochs | None = None,
    on_cap: repeats.OnCap = "error",
    positions: Positions | None = None,
    cache_dir: str | os.PathLike | None = None,
    changed_cache: cache.Changed = "refuse",
    verify_cache: bool = True,
) -> "Stream":
    """The training stream of a SeqIO mixture or task; token caches that are missing are built.

    A task masks or weighs its tokens by an output feature 'loss_weights', declared as
    `seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False, dtype=tf.float32)`: one number per
    target token, BOS and EOS included, which becomes its weight in the loss. Without it all are 1.

    Args:
        mixture_or_task_name: registered with SeqIO. A mixture's rates are taken as the shares of
            training *tokens* of its tasks (SeqIO's own sampler takes them as shares of examples).
        task_feature_lengths: {'targets': tokens per row}; with 'inputs' as well, the rows are those
            of an encoder-decoder.
        batch_size: rows of the global batch.
        seed: of the order of rows.
        split: of the tasks.
        weights: 'rates' takes the mixture's rates, 'tokens' the number of tokens of each task.
        temperature: raises the weights to 1 / temperature before they are normalised.
        max_tokens: with weights='tokens', tasks count as having no more tokens than this.
        phases: in place of the mixture's rates, ((first step, {task: share of tokens}), ...), the
            first from step 0 on. Tasks left out of a phase are not read in it.
        interleaving: 'error_diffusion' keeps every source within one row of its share at any time;
            'random' orders the rows of each period at random, for comparison.
        packing: 'best_fit', 'concat' or 'examples'; see `data.plan.make_plan`.
        long_documents: 'split' into several segments, or 'truncate'; counted in `summary()`.
        cross_document_attention: make each row one segment, so that its documents see each other.
        start_token: what the model reads before the first token of every document.
        max_epochs: how often a source may be read at most: a number, or {task: number} for some. What
            earlier phases have read of it counts.
        on_cap: what becomes of a run that would read a source more often: an 'error' before its first
            step, a warning ('warn'), or 'redistribute': from the step on that would pass the cap the
            other sources of the phase share what the source had, pro rata.
        positions: go on in the order of each source where another stream stopped, as its
            `Stream.positions` says; None begins at the beginning.
        cache_dir: the root of all caches; $ESPALIER_CACHE or ~/.cache/espalier if None.
        changed_cache: what to do where a task has changed since its cache was built: 'refuse',
            'build' a second cache, or 'replace' the first.
        verify_cache: check every byte of the caches against its checksum.

    Raises:
        ValueError: what cannot be streamed, before anything is read.
    """
    tasks, weight_of = mixing.find_tasks(mixture_or_task_name)
    known = tuple(task.name for task in tasks)
    if weights not in mixing.WEIGHTS:
        raise ValueError(f"weights={weights!r} is none of {', '.join(map(repr, mixing.WEIGHTS))}.")
    if phases is not None and (weights != "rates" or temperature != 1.0):
        raise ValueError("phases give the weights themselves: leave weights and temperature out.")
    if max_tokens is not None and weights != "tokens":
        raise ValueError("max_tokens caps token counts: it needs weights='tokens'.")
    if phases is not None:
        phases = mixing.checked_phases(phases, known)
    elif weights == "rates":
        rates = mixing.tempered(weight_of, temperature)
        where = f"mixture {mixture_or_task_name!r}"
        phases = [(0, mixing.normalised(rates, known, where))]
    wanted = known if phases is None else {name for _, shares in phases for name in shares}
    sources = [
        _open_source(
            task,
            split,
            task_feature_lengths,
            packing=packing,
            long_documents=long_documents,
            cache_dir=cache_dir,
            changed=changed_cache,
            verify=verify_cache,
        )
        for task in tasks
        if task.name in wanted
    ]
    if isinstance(max_epochs, Mapping):  # a mixture's caps may stay where a phase leaves some out
        left_out = set(known) - set(wanted)
        max_epochs = {name: cap for name, cap in max_epochs.items() if name not in left_out}
    if phases is None:
        counts = {source.name: source.plan.tokens() for source in sources}
        phases = ((0, mixing.tempered(counts, temperature, max_tokens)),)
    return Stream(
        sources,
        phases,
        batch_size=batch_size,
        seed=seed,
        cross_document_attention=cross_document_attention,
        start_token=start_token,
        interleaving=interleaving,
        max_epochs=max_epochs,
        on_cap=on_cap,
        positions=positions,
    )


def make_eval_stream(
    *,
    task: str,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    split: str = "validation",
    packing: plan.Packing = "best_fit",
    long_documents: plan.LongDocuments = "split",
    cross_document_attention: bool = False,
    start_token: int = 0,
    cache_dir: str | os.PathLike | None = None,
    changed_cache: cache.Changed = "refuse",
    verify_cache: bool = True,
) -> "EvalStream":
    """The held-out stream of one SeqIO task: every row once, in a fixed order of no meaning.

    Plans begin with the pieces of long documents, so their own order would make a first part of the
    batches (EVAL_STEPS) a biased sample.

    Mixtures are evaluated task by task, as SeqIO does. Arguments as for `make_stream`.

    Raises:
        NoSplitError: the task has no such split.
        ValueError: what cannot be streamed.
    """
    tasks, _ = mixing.find_tasks(task)
    if [found.name for found in tasks] != [task]:
        raise ValueError(
            f"{task!r} is a mixture: evaluate its tasks one by one, as task = each of "
            f"{', '.join(found.name for found in tasks)}."
        )
    if split not in tasks[0].splits:
        raise NoSplitError(
            f"Task {task!r} has no split {split!r}; it has {', '.join(sorted(tasks[0].splits))}. Hold "
            "documents out (VALIDATION_FRACTION above 0, or VALIDATION_FILES), or leave the task out "
            "of the evaluation."
        )
    source = _open_source(
        tasks[0],
        split,
        task_feature_lengths,
        packing=packing,
        long_documents=long_documents,
        cache_dir=cache_dir,
        changed=changed_cache,
        verify=verify_cache,
    )
    return EvalStream(
        source,
        batch_size=batch_size,
        cross_document_attention=cross_document_attention,
        start_token=start_token,
    )


def held_out(
    open_stream: Callable[..., "EvalStream"], tasks: Sequence[str]
) -> tuple["EvalStream", ...]:
    """The evaluation streams of those tasks that hold something out; says which do not."""
    opened = []
    for name in tasks:
        try:
            opened.append(open_stream(task=name))
        except NoSplitError as error:
            # The first line only: gin appends where it was called from.
            print(f"Not evaluated: {str(error).splitlines()[0]}", file=sys.stderr)
    return tuple(opened)


def _open_source(
    task, split, feature_lengths, *, packing, long_documents, **cache_settings
) -> rows.Source:
    from data import task_cache  # brings SeqIO, which a stream over caches does not need

    opened = task_cache.open_task_cache(task, split, **cache_settings)
    return rows.plan_source(
        task.name, opened, feature_lengths, packing=packing, long_documents=long_documents
    )


class _Rows(abc.ABC):
    """What both streams share: sources, and rows of them turned into batches."""

    def __init__(
        self,
        sources: Sequence[rows.Source],
        batch_size: int,
        cross_document_attention: bool,
        start_token: int,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be positive.")
        if cross_document_attention and len(sources[0].plan.row_lengths) > 1:
            raise ValueError(
                "cross_document_attention is for decoder-only rows: leave 'inputs' out."
            )
        self.batch_size = batch_size
        self._sources = tuple(sources)
        self._cross_document_attention = cross_document_attention
        self._start_token = start_token
        self._vocabulary = rows.shared_vocabulary(self._sources)

    @property
    def length(self) -> int:
        """Target tokens per row."""
        return self._sources[0].plan.row_lengths["targets"]

    @property
    def source_names(self) -> tuple[str, ...]:
        """What `source_ids` index."""
        return tuple(source.name for source in self._sources)

    def batch(self, step: int, lo: int, hi: int) -> dict[str, np.ndarray]:
        """Rows [lo, hi) of the batch of `step`; see `data.rows.read_rows` for the columns."""
        source_B, _, row_B = self._locate(step, lo, hi)
        return rows.read_rows(
            self._sources,
            source_B,
            row_B,
            cross_document_attention=self._cross_document_attention,
            start_token=self._start_token,
        )

    def documents(self, step: int, lo: int, hi: int) -> list[dict]:
        """Source, epoch, plan row and documents of rows [lo, hi) of the batch of `step`."""
        return [
            {
                "source": self._sources[source].name,
                "epoch": epoch,
                "row": row,
                "documents": self._sources[source].documents(row),
            }
            for source, epoch, row in zip(
                *(array.tolist() for array in self._locate(step, lo, hi)), strict=True
            )
        ]

    def summary(self) -> dict:
        """What to record with a run: sizes, fills, and what happened to long documents."""
        first = self._sources[0].plan
        return {
            "fingerprint": self.fingerprint,
            "batch_size": self.batch_size,
            "lengths": first.row_lengths,
            "packing": first.packing,
            "long_documents": first.long_documents,
            "cross_document_attention": self._cross_document_attention,
            "start_token": self._start_token,
            "vocabulary": self._vocabulary,
            "sources": {source.name: source.summary() for source in self._sources},
        }

    @abc.abstractmethod
    def _locate(self, step: int, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source, epoch, plan row) of each row."""

    def _check_range(self, lo: int, hi: int) -> None:
        if not 0 <= lo <= hi <= self.batch_size:
            raise ValueError(f"Rows [{lo}, {hi}) are not within a batch of {self.batch_size}.")

    def _fingerprint(self, **settings) -> str:
        parts = {
            "version": _VERSION,
            "batch_size": self.batch_size,
            "cross_document_attention": self._cross_document_attention,
            "sources": [
                [s.name, s.cache.content, s.plan.row_lengths, s.plan.packing, s.plan.long_documents]
                for s in self._sources
            ],
        }
        if self._start_token:  # 0 was the only one when runs began to record fingerprints
            parts["start_token"] = self._start_token
        return cache.digest({**parts, **settings})


class Stream(_Rows):
    """An endless stream over a mixture of sources; see `make_stream`.

    Args:
        sources: made by `data.rows.plan_source`. Those that never have weight are left out, so that
            they change nothing, not even `source_ids`.
        phases, max_epochs, on_cap, positions: see `make_stream`.
    """

    def __init__(
        self,
        sources: Sequence[rows.Source],
        phases: Phases,
        *,
        batch_size: int,
        seed: int = 0,
        cross_document_attention: bool = False,
        start_token: int = 0,
        interleaving: str = "error_diffusion",
        max_epochs: repeats.MaxEpochs | None = None,
        on_cap: str = "error",
        positions: Positions | None = None,
    ):
        if on_cap not in repeats.ON_CAP:
            raise ValueError(
                f"on_cap={on_cap!r} is none of {', '.join(map(repr, repeats.ON_CAP))}."
            )
        phases = mixing.checked_phases(phases, tuple(source.name for source in sources))
        limits = repeats.row_limits(max_epochs, {s.name: s.plan.num_rows for s in sources})
        used = {name for _, shares in phases for name in shares}
        sources = [source for source in sources if source.name in used]
        super().__init__(sources, batch_size, cross_document_attention, start_token)
        self._seed = seed
        self._limits = {name: rows for name, rows in limits.items() if name in used}
        self._on_cap = on_cap
        self._before = self._read_before(positions or {})

        def dealt(phases: Phases) -> schedule.Schedule:
            # A row of a source holds fill * length tokens: token shares become row shares.
            return schedule.Schedule(
                [
                    (start, [shares.get(s.name, 0.0) / s.plan.fill() for s in sources])
                    for start, shares in phases
                ],
                sources=self.source_names,
                batch_size=batch_size,
                interleaving=interleaving,
                seed=order.hash64(seed, "interleaving"),
                first_rows=self._before,
            )

        settings: dict[str, Any] = {}  # what is not said is as it was before it could be said
        if any(self._before):
            settings["before"] = self._before
        dealt_out = repeats.Redistributed(phases, [], None)
        if on_cap == "redistribute" and self._limits:
            settings["limits"] = self._limits
            dealt_out = repeats.redistribute(phases, self._limits, dealt)
        self._phases, self._full, self._end = dealt_out.phases, dealt_out.full, dealt_out.end
        if not self._phases:
            raise ValueError(
                f"max_epochs leaves nothing of {', '.join(map(repr, phases[0][1]))} for step 0 (before "
                f"it: {self._repeats(self._before)}): raise max_epochs, or add data."
            )
        self._schedule = dealt(self._phases)
        self.fingerprint = self._fingerprint(
            seed=seed, phases=phases, interleaving=interleaving, **settings
        )

    def epochs(self, step: int) -> dict[str, float]:
        """How often each source has been read in the steps before `step` and before the first."""
        used = self._schedule.used(step).tolist()
        return {s.name: used[i] / s.plan.num_rows for i, s in enumerate(self._sources)}

    def positions(self, step: int) -> dict[str, dict[str, Any]]:
        """How far each source has been read in the steps before `step`: where a later phase goes on."""
        used = self._schedule.used(step).tolist()
        return {
            source.name: {"rows": rows, "order": self._order_of(source)}
            for source, rows in zip(self._sources, used, strict=True)
        }

    def check_repeats(self, steps: int) -> list[str]:
        """What a run of so many steps has to be told about caps that it meets.

        Raises:
            ValueError: it would read a source more often than it may, or beyond the end of all data.
        """
        if self._on_cap == "redistribute":
            if self._end is not None and self._end < steps:
                raise ValueError(
                    f"{self._no_more()} The run has {steps:,} steps: raise max_epochs, add data, or "
                    "train less."
                )
            return [
                f"{', '.join(names)} reach max_epochs at step {step:,} and give their share to the "
                "other sources from there on"
                for step, names in self._full
                if step < steps
            ]
        used, found = self._schedule.used(steps), []
        for index, source in enumerate(self._sources):
            limit = self._limits.get(source.name)
            if limit is not None and used[index] > limit:
                tokens, rows = source.plan.tokens(), source.plan.num_rows
                found.append(
                    f"source {source.name!r} has {tokens:,} tokens, and {steps:,} steps read "
                    f"{tokens * used[index] / rows:,.0f} of it, {used[index] / rows:.2f} epochs where "
                    f"max_epochs allows {limit / rows:.2f}"
                )
        if found and self._on_cap == "error":
            raise ValueError(
                f"{'; '.join(found)}. Lower its share or the budget, add data, raise max_epochs, or "
                "set on_cap='redistribute' to give its share to the other sources from there on."
            )
        return found

    def tokens_per_step(self, step: int) -> float:
        """Loss-bearing tokens of a batch in the phase of `step`, on average."""
        per_row = np.array([s.plan.tokens() / s.plan.num_rows for s in self._sources])
        return float(self.batch_size * (self._schedule.shares(step) @ per_row))

    def steps_for_tokens(self, tokens: float, first_step: int = 0) -> int:
        """Steps from `first_step` on that train on `tokens` loss-bearing tokens, rounded up.

        Raises:
            ValueError: the sources that are capped and redistributed hold fewer.
        """
        step = first_step
        last = math.inf if self._end is None else self._end
        ends = [start for start in self._schedule.starts if start > first_step] + [last]
        for end in ends:
            per_step = self.tokens_per_step(step)
            needed = math.ceil(tokens / per_step)
            if step + needed <= end:
                return step + needed - first_step
            tokens -= (end - step) * per_step
            step = end
        raise ValueError(
            f"{self._no_more()} That is {tokens:,.0f} tokens less than the budget: raise max_epochs, add "
            "data, or lower the budget."
        )

    def summary(self) -> dict:
        phases = [
            {
                "first_step": start,
                "token_shares": shares,
                "row_shares": dict(
                    zip(self.source_names, self._schedule.shares(start).tolist(), strict=True)
                ),
                "tokens_per_step": self.tokens_per_step(start),
            }
            for start, shares in self._phases
        ]
        facts = {**super().summary(), "seed": self._seed, "phases": phases}
        if self._limits:
            facts["on_cap"] = self._on_cap
            facts["max_epochs"] = {
                s.name: self._limits[s.name] / s.plan.num_rows
                for s in self._sources
                if s.name in self._limits
            }
        if any(self._before):
            facts["epochs_before"] = self.epochs(0)
        return facts

    def _order_of(self, source: rows.Source) -> str:
        """Digest of what decides the order of a source's rows and what is in them."""
        made = source.plan
        return cache.digest(
            [
                self._seed,
                source.cache.content,
                made.row_lengths,
                made.packing,
                made.long_documents,
            ]
        )[:16]

    def _read_before(self, positions: Positions) -> list[int]:
        """Rows of each source that an earlier run has read, in the order that this one reads on in."""
        before = []
        for source in self._sources:
            there = positions.get(source.name, {"rows": 0, "order": self._order_of(source)})
            if there["order"] != self._order_of(source):
                raise ValueError(
                    f"Source {source.name!r} cannot be read on from where the earlier run stopped: its "
                    "content, packing, row length or the seed is another, so that rows would come "
                    "twice. Bring these back, or begin anew (INITIAL_DATA = 'restart')."
                )
            before.append(int(there["rows"]))
        return before

    def _repeats(self, used: Sequence[int]) -> str:
        pairs = zip(self._sources, used, strict=True)
        return ", ".join(f"{s.name} {count / s.plan.num_rows:.2f} epochs" for s, count in pairs)

    def _no_more(self) -> str:
        assert self._end is not None
        return (
            f"From step {self._end:,} on every source of the mixture has been read as often as "
            f"max_epochs allows ({self._repeats(self._schedule.used(self._end).tolist())})."
        )

    def _locate(self, step: int, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._check_range(lo, hi)
        if self._end is not None and step >= self._end:
            raise ValueError(f"There is no batch {step}. {self._no_more()}")
        source_B, position_B = self._schedule.locate(step, lo, hi)
        epoch_B, row_B = np.zeros_like(position_B), np.zeros_like(position_B)
        for index in np.unique(source_B):
            source, here = self._sources[index], source_B == index
            epoch_B[here], row_B[here] = order.shuffled_rows(
                position_B[here], source.plan.num_rows, self._seed, source.name
            )
        return source_B, epoch_B, row_B


class EvalStream(_Rows):
    """Every row of one source once; rows past the end have weight 0. See `make_eval_stream`.

    Attributes:
        name: of the source.
        num_steps: batches that cover it.
        bytes_per_token: UTF-8 bytes of text per target token, for bits per byte; 0 if unknown, as
            where tokens have weights of their own.
    """

    def __init__(
        self,
        source: rows.Source,
        *,
        batch_size: int,
        cross_document_attention: bool = False,
        start_token: int = 0,
    ):
        super().__init__([source], batch_size, cross_document_attention, start_token)
        self.name = source.name
        self.num_steps = -(-source.plan.num_rows // batch_size)
        weighted = rows.LOSS_WEIGHTS in source.cache.columns
        text_bytes = 0 if weighted else source.cache.text_bytes() or 0
        self.bytes_per_token = text_bytes / source.cache.tokens()
        self.fingerprint = self._fingerprint(order="permuted")

    def summary(self) -> dict:
        return {**super().summary(), "num_steps": self.num_steps}

    def _locate(self, step: int, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._check_range(lo, hi)
        if not 0 <= step < self.num_steps:
            raise ValueError(
                f"{self.name!r} has {self.num_steps} batches; there is no batch {step}."
            )
        place_B = step * self.batch_size + np.arange(lo, hi, dtype=np.int64)
        num_rows = self._sources[0].plan.num_rows
        row_B = np.full_like(place_B, rows.NO_ROW)
        held = place_B < num_rows
        row_B[held] = order.permute(place_B[held], num_rows, order.hash64("evaluation", self.name))
        return np.zeros_like(row_B), np.zeros_like(row_B), row_B
