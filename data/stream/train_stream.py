"""The training stream: an endless mixture of sources with random access to any step."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common.ranges import Count, NonNegative, check_choice
from espalier.data.cache import store
from espalier.data.stream import mixing, order, rows, schedule
from espalier.data.stream.row_stream import RowStream

Phases = Sequence[tuple[Count, Mapping[str, NonNegative]]]
# Source -> {'rows': rows read so far, 'order': digest of the order of the rows}.
Positions = Mapping[str, Mapping[str, Any]]


class Stream(RowStream):
    """An endless stream over a mixture of sources; see `data.stream.stream.make_stream`.

    Args:
        sources: made by `data.stream.rows.plan_source`. Sources without weight in any phase are
            ignored and do not change `source_ids`.
        phases, max_epochs, on_cap, positions: see `data.stream.stream.make_stream`.
    """

    updates = 1  # of a batch; steps are counted in updates

    def __init__(
        self,
        sources: Sequence[rows.Source],
        phases: Phases,
        *,
        batch_size: int,
        seed: int = 0,
        cross_document_attention: bool = False,
        start_token: int | None = 0,
        interleaving: str = "error_diffusion",
        max_epochs: schedule.MaxEpochs | None = None,
        on_cap: str = "error",
        positions: Positions | None = None,
    ):
        check_choice("on_cap", on_cap, schedule.OnCap)
        phases = mixing.checked_phases(phases, tuple(source.name for source in sources))
        limits = schedule.row_limits(max_epochs, {s.name: s.plan.num_rows for s in sources})
        used = {name for _, shares in phases for name in shares}
        sources = [source for source in sources if source.name in used]
        super().__init__(sources, batch_size, cross_document_attention, start_token)
        self._seed = seed
        self._limits = {name: rows for name, rows in limits.items() if name in used}
        self._on_cap = on_cap
        self._before = self._read_before(positions or {})

        def make_schedule(phases: Phases) -> schedule.Schedule:
            # A row of a source holds fill * length tokens, so dividing by fill turns token shares
            # into row shares.
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

        settings: dict[str, Any] = {}  # defaults are omitted, so older fingerprints remain valid
        if any(self._before):
            settings["before"] = self._before
        self._phases, self._end = phases, None
        self._full: list[tuple[int, tuple[str, ...]]] = []
        if on_cap == "redistribute" and self._limits:
            settings["limits"] = self._limits
            self._phases, self._full, self._end = schedule.redistribute(
                phases, self._limits, make_schedule
            )
        if not self._phases:
            raise ValueError(
                f"max_epochs leaves no row of {', '.join(map(repr, phases[0][1]))} for step 0 (read "
                f"before: {self._repeats(self._before)}). Raise max_epochs, or add data."
            )
        self._schedule = make_schedule(self._phases)
        self.fingerprint = self._fingerprint(
            seed=seed, phases=phases, interleaving=interleaving, **settings
        )

    @property
    def num_steps(self) -> int | None:
        """The batches before all sources reach their caps (on_cap='redistribute'); None for an endless stream."""
        return self._end

    def epochs(self, step: int) -> dict[str, float]:
        """Returns {source: epochs read before `step`}, including reading before step 0."""
        used = self._schedule.used(step).tolist()
        return {s.name: used[i] / s.plan.num_rows for i, s in enumerate(self._sources)}

    def positions(self, step: int) -> dict[str, dict[str, Any]]:
        """Returns the position of each source before `step`, from which a later run can continue."""
        used = self._schedule.used(step).tolist()
        return {
            source.name: {"rows": rows, "order": self._order_of(source)}
            for source, rows in zip(self._sources, used, strict=True)
        }

    def check_repeats(self, steps: int) -> list[str]:
        """Returns warnings about the caps that a run of `steps` steps reaches.

        Raises:
            ValueError: with on_cap='error', the run would exceed a source's cap; with
                'redistribute', it would exceed the caps of all sources of a phase.
        """
        if self._on_cap == "redistribute":
            if self._end is not None and self._end < steps:
                raise ValueError(
                    f"{self._no_more()} The run has {steps * self.updates:,} steps: raise max_epochs, add data, or "
                    "lower the number of steps."
                )
            return [
                f"{', '.join(names)} reach max_epochs at step {step * self.updates:,}; from then on the other sources "
                "take their share"
                for step, names in self._full
                if step < steps
            ]
        used, warnings = self._schedule.used(steps), []
        for index, source in enumerate(self._sources):
            limit = self._limits.get(source.name)
            if limit is not None and used[index] > limit:
                tokens, rows = source.plan.tokens(), source.plan.num_rows
                warnings.append(
                    f"source {source.name!r} has {tokens:,} tokens, and {steps * self.updates:,} steps read "
                    f"{tokens * used[index] / rows:,.0f} tokens of it: {used[index] / rows:.2f} epochs, "
                    f"but max_epochs allows {limit / rows:.2f}"
                )
        if warnings and self._on_cap == "error":
            raise ValueError(
                f"{'; '.join(warnings)}. Lower its share or the budget, add data, raise max_epochs, or "
                "set on_cap='redistribute', which then gives its share to the other sources."
            )
        return warnings

    def notices(self, lengths: Mapping[str, int] | None = None) -> list[rows.Notice]:
        """Returns those of all streams, and messages on sources with fewer rows than a batch reads of them."""
        found = super().notices(lengths)
        starts = [start for start, _ in self._phases]
        shares_PN = np.array([self._schedule.shares(start) for start in starts])
        for source, share in zip(self._sources, shares_PN.max(axis=0).tolist(), strict=True):
            count = source.plan.num_rows
            if (times := share * self.batch_size / count) > 1:
                text = (
                    f"{source.name}: a batch of {self.batch_size:,} rows has the same rows {times:.3g} times, because the data "
                    f"fill {count:,}: BATCH_SIZE = {max(1, int(count / share)):,} makes more updates of as many epochs"
                )
                found.append(("WARNING" if times >= 2 else "repeats", text))
        return found

    def tokens_per_step(self, step: int) -> float:
        """Returns the mean number of tokens with a loss per batch, by their weights, in the phase of `step`."""
        per_row = np.array([s.loss_tokens / s.plan.num_rows for s in self._sources])
        return float(self.batch_size * (self._schedule.shares(step) @ per_row))

    def steps_for_tokens(self, tokens: float, first_step: int = 0) -> int:
        """Returns the steps from `first_step` on that train on `tokens` tokens with loss, rounded up.

        Raises:
            ValueError: with on_cap='redistribute', all sources of a phase reach their caps first; no token of a phase has a
                loss.
        """
        step = first_step
        last = math.inf if self._end is None else self._end
        ends = [start for start in self._schedule.starts if start > first_step] + [last]
        for end in ends:
            per_step = self.tokens_per_step(step)
            if not per_step:
                raise ValueError(
                    f"From step {step * self.updates:,} on, no token has a loss weight, so that no number of steps is {tokens:,.0f} tokens with "
                    "a loss: give TRAIN_STEPS in place of TRAIN_TOKENS, or correct the feature 'loss_weights'."
                )
            needed = math.ceil(tokens / per_step)
            if step + needed <= end:
                return step + needed - first_step
            tokens -= (end - step) * per_step
            step = int(end)
        raise ValueError(
            f"{self._no_more()} The budget needs {tokens:,.0f} tokens more: raise max_epochs, add data, or "
            "lower the budget."
        )

    def steps_for_epochs(self, epochs: float) -> int:
        """Returns the steps that read as many rows as `epochs` epochs of all sources have, rounded up."""
        rows = sum(source.plan.num_rows for source in self._sources)
        return math.ceil(epochs * rows / self.batch_size)

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
        """Returns a digest of all that determines the content and order of a source's rows."""
        return store.digest([self._seed, source.cache.content, *source.plan.policy])[:16]

    def _read_before(self, positions: Positions) -> list[int]:
        """Returns the rows of each source that an earlier run has read."""
        before = []
        for source in self._sources:
            position = positions.get(source.name, {"rows": 0, "order": self._order_of(source)})
            if position["order"] != self._order_of(source):
                raise ValueError(
                    f"Source {source.name!r} cannot continue where the earlier run stopped: its content, "
                    "packing, row length or the seed has changed, so that rows would repeat. Restore "
                    "these, or start from the beginning (INITIAL_DATA = 'restart')."
                )
            before.append(int(position["rows"]))
        return before

    def _repeats(self, used: Sequence[int]) -> str:
        pairs = zip(self._sources, used, strict=True)
        return ", ".join(f"{s.name} {count / s.plan.num_rows:.2f} epochs" for s, count in pairs)

    def _no_more(self) -> str:
        assert self._end is not None
        return (
            f"From step {self._end * self.updates:,} on, all sources of the mixture have reached max_epochs "
            f"({self._repeats(self._schedule.used(self._end).tolist())})."
        )

    def _locate(self, step: int, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self._check_range(lo, hi)
        if self._end is not None and step >= self._end:
            raise ValueError(f"There is no further batch. {self._no_more()}")
        source_B, position_B = self._schedule.locate(step, lo, hi)
        epoch_B, row_B = np.zeros_like(position_B), np.zeros_like(position_B)
        for index in np.unique(source_B):
            source, is_source_B = self._sources[index], source_B == index
            epoch_B[is_source_B], row_B[is_source_B] = order.shuffled_rows(
                position_B[is_source_B], source.plan.num_rows, self._seed, source.name
            )
        return source_B, epoch_B, row_B
