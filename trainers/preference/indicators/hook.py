"""An evaluation hook that measures indicators of over-optimisation in preference training (arXiv 2410.11677).

docs/use/preference_indicators.md explains each number. The metrics are named 'indicators/<name>'. They are computed on
held-out pairs, and on outputs that the policy generates on the run's mesh with its current weights.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import numpy as np

from espalier.common.bars import Bar
from espalier.common.end_tokens import eos_ids
from espalier.common.ranges import CalledWith, Count, Fraction, NonNegative, Seed, Size
from espalier.model.protocol import inference_model, inference_params
from espalier.trainers.decoding.policy_sampler import Generator
from espalier.trainers.decoding.sampling import Sampling
from espalier.trainers.decoding.settings import Settings
from espalier.trainers.hooks import Hook, HookInterruptedError, RunContext
from espalier.trainers.objectives.frozen_model import FrozenModel
from espalier.trainers.preference.indicators import measures, samples
from espalier.trainers.preference.indicators.alarm import PREFIX, Alarm, Monitor, StoppingRule
from espalier.trainers.preference.indicators.reader import TOP_K, Reader
from espalier.trainers.rewards.base import Completion, Reward, StoredReward, finite_rewards, on_mesh
from espalier.trainers.scoring.scoring import Row
from espalier.trainers.train_state import TrainState

_QUIET_SECONDS = 10  # an evaluation that takes longer shows a progress bar
_log = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True)
class PreferenceIndicators(Hook):
    """A hook that computes the indicators, writes samples, and raises at most one alarm.

    All numbers are a function of seed, step and weights, so a resumed run writes the same numbers.

    Attributes:
      run: context of the run, passed by `espalier train`.
      pairs: opens the held-out pairs of a task, called with (task=).
      tasks: the tasks whose pairs and prompts are evaluated together.
      vocabulary: vocabulary of the data; its EOS ends outputs.
      every: updates between evaluations; there is also one before the first update and one after the last.
      also_at: steps of further evaluations, such as more frequent ones at the beginning.
      num_pairs: maximum number of held-out pairs; None for all.
      num_prompts: maximum number of prompts from which the policy generates.
      max_new_tokens: maximum tokens of an output.
      temperature, top_p: sampling settings.
      eos_ids: tokens that end an output, instead of the vocabulary's EOS.
      batch_size: sequences at a time, rounded up to a multiple of the mesh's parts of a batch.
      top_k: number of likeliest tokens.
      diversity: measures.diversity with its settings; called with (outputs, vocab_size=).
      reference: the model for the log-ratio and L2 distance; with None neither is computed, and no second model is in
        memory.
      reward: scores outputs; None for no rewards. A completion's info has the texts 'chosen' and 'rejected' of the
        prompt's pair.
      competitor: a file of outputs that compete with the policy's (see samples.py); None to use the policy's outputs
        at the first evaluation, before the first update.
      rule: decides when to raise the alarm.
      stop: 'alarm' ends the run at the alarm; with 'never' it continues.

    Raises:
      ValueError: settings that contradict each other, no pairs, a vocabulary without EOS, or a reference that does not
        match the run.
      CompetitorError: the competitor's outputs are missing.
    """

    run: RunContext
    pairs: Annotated[Callable[..., samples.PairStream], CalledWith("task")]
    tasks: Sequence[str]
    vocabulary: Any
    every: Size = 50
    also_at: Sequence[Size] = ()
    num_pairs: Size | None = 256
    num_prompts: Size = 128
    max_new_tokens: Size = 256
    temperature: NonNegative = 0.5
    top_p: Fraction | None = 0.75
    eos_ids: Sequence[Count] | None = None
    batch_size: Size = 16
    top_k: Size = TOP_K
    diversity: Callable[..., float] = measures.diversity
    reference: FrozenModel | None = None
    reward: Reward | StoredReward | None = None
    competitor: str | None = None
    rule: StoppingRule = StoppingRule()
    stop: Literal["never", "alarm"] = "never"
    seed: Seed = 0
    at_start = True
    prefix = PREFIX
    ended_by = "INDICATORS_STOP = 'alarm'"

    def __post_init__(self):
        self._check()
        data = samples.read_held_out(
            self.pairs, self.tasks, num_pairs=self.num_pairs, num_prompts=self.num_prompts
        )
        self._prompts, self._start = data.prompts, data.start
        if not self._start and not all(self._prompts):
            raise ValueError(
                "PreferenceIndicators: a held-out prompt is empty and has no start token. Set DOCUMENT_START."
            )
        self._chosen = [self._row(pair.prompt, pair.chosen) for pair in data.pairs]
        self._rejected = [self._row(pair.prompt, pair.rejected) for pair in data.pairs]
        self._texts = samples.Texts(self.vocabulary, frozenset(self._ends()))
        program = self.run.program
        meta = {"vocabulary": data.vocabulary, "start_token": next(iter(data.start), None)}
        if self.reference is not None:
            self.reference.check(program.mesh, program.rules, meta)
        self._model = model = inference_model(program.recipe.language_model)
        self._num_ids = min(self.vocabulary.vocab_size, model.config.vocab_size)
        devices = program.mesh.devices.size
        shards = devices // program.batch_sharding.shard_shape((devices,))[0]
        self._batch_size = -(-self.batch_size // shards) * shards
        self._reader = self._reader_of(model)
        self._generator = Generator(
            model,
            [[*self._start, *prompt] for prompt in self._prompts],
            Settings(
                max_new_tokens=self.max_new_tokens,
                sampling=Sampling(temperature=self.temperature, top_p=self.top_p),
                eos_ids=self._ends(),
                num_ids=self._num_ids,
            ),
            batch_size=self._batch_size,
            sharding=program.batch_sharding,
            seed=self.seed,
        )
        self._infos = [
            {"chosen": self._texts.text(pair.chosen), "rejected": self._texts.text(pair.rejected)}
            for pair in data.prompted
        ]
        self._monitor = Monitor.recovered(
            self.rule, os.path.join(self.run.path, "metrics.jsonl"), self.run.step
        )
        if self.reward is not None:
            self._reward = on_mesh(
                self.reward, program.mesh, program.rules, meta=meta, folder=self.run.path
            )
            # The competitor's rewards; None until the first evaluation, whose outputs then compete.
            competing = self._competing()
            self._competing_N = None if competing is None else self._rewards(competing)

    @property
    def ended(self) -> bool:
        """Whether the run should end at this step."""
        return self.stop == "alarm" and self._monitor.alarm is not None

    def __call__(
        self, step: int, state: TrainState, metrics: Mapping[str, float]
    ) -> Mapping[str, float]:
        del metrics
        params = state.released_params
        params = inference_params(self.run.program.recipe.language_model, params)
        with _progress(self._batches, f"indicators at step {step}", self.run.should_stop) as done:
            indicators = self._pair_indicators(params, done)
            outputs = self._generator(params, step, done=done)
            indicators |= self._output_indicators(params, step, outputs, done)
        indicators |= self._alarm_indicators(step, indicators)
        return {PREFIX + name: value for name, value in indicators.items() if not np.isnan(value)}

    def _pair_indicators(self, params: Any, done: Callable[[], None]) -> dict[str, float]:
        readings = self._reader(params, [*self._chosen, *self._rejected], done=done)
        chosen, rejected = readings[: len(self._chosen)], readings[len(self._chosen) :]
        likely, unlikely = (_mean(row.mean_log_prob for row in side) for side in (chosen, rejected))
        indicators = {
            "llh_chosen": likely,
            "llh_rejected": unlikely,
            "llh_gap": likely - unlikely,
            "entropy_chosen": _mean(row.entropy for row in chosen),
            "mass_chosen": _mean(row.mass for row in chosen),
        }
        if self.reference is not None:
            policy_N = np.array([row.mean_log_prob for row in chosen])
            distance = measures.likelihood_distance(policy_N, self._reference_of_chosen)
            indicators["llh_distance"] = distance
        return indicators

    def _output_indicators(
        self, params: Any, step: int, outputs: Sequence[list[int]], done: Callable[[], None]
    ) -> dict[str, float]:
        """Returns the indicators on the policy's outputs, by policy, reference and reward; writes the outputs to a file."""
        pairs = list(zip(self._prompts, outputs, strict=True))
        rows = [self._row(*pair) for pair in pairs]
        readings = self._reader(params, rows, done=done)
        completions = [self._texts.completion(*pair) for pair in pairs]
        numbers: list[dict[str, float]] = [
            {"entropy": row.entropy, "mass": row.mass} for row in readings
        ]
        texts = [completion.tokens for completion in completions]
        indicators = {
            "entropy": _mean(row.entropy for row in readings),
            "mass": _mean(row.mass for row in readings),
            "ead": self.diversity(texts, vocab_size=self._num_ids),
            "length": _mean(row.length for row in readings),
            "ended": _mean(completion.ended for completion in completions),
        }
        if self.reference is not None:
            theirs = self._reference_reader(self._reference_params, rows, done=done)
            policy_N, reference_N = (
                np.array([row.log_prob for row in side]) for side in (readings, theirs)
            )
            indicators["kl"] = measures.sampled_divergence(policy_N, reference_N)
            for row, ratio in zip(numbers, policy_N - reference_N, strict=True):
                row["log_ratio"] = float(ratio)
        if self.reward is not None:
            rewards_N = self._rewards(completions)
            if self._competing_N is None:
                self._competing_N = rewards_N
            indicators["reward"] = float(np.mean(rewards_N, dtype=np.float64))
            indicators["p_win"] = measures.win_probability(rewards_N, self._competing_N)
            for row, reward in zip(numbers, rewards_N, strict=True):
                row["reward"] = float(reward)
        if self.run.writer:
            written = zip(completions, numbers, strict=True)
            samples.write(self.run.path, step, [self._texts.row(c, **n) for c, n in written])
        return indicators

    def _alarm_indicators(self, step: int, indicators: Mapping[str, float]) -> dict[str, float]:
        """Returns whether the alarm is raised, and the number that decides which checkpoints are retained."""
        raised = self._monitor.add(step, indicators)
        if raised is not None and self.run.writer:
            _log.warning(self._advice(raised))
        result = {"alarm": float(self._monitor.alarm is not None)}
        if self.reward is not None:
            result["retain"] = indicators["reward"]
        elif self._monitor.alarm is None:
            result["retain"] = float(step)  # the last before the alarm
        return result

    def _advice(self, alarm: Alarm) -> str:
        if self.reward is not None:
            best = "the checkpoint with the best mean reward"
        elif alarm.before:
            best = f"the checkpoint of step {alarm.before} (saved if checkpoints are as frequent as indicators)"
        else:
            best = "the model that the run began with"
        end = "continues; INDICATORS_STOP = 'alarm' would end it here"
        return (
            f"step {alarm.step}: signs of over-optimisation: {alarm.reason}. The run "
            f"{'ends here' if self.stop == 'alarm' else end}. Use {best}, or train again with a larger BETA, an NLL term "
            "in LOSSES or a lower LEARNING_RATE."
        )

    def _competing(self) -> list[Completion] | None:
        path: str | os.PathLike | None = self.competitor
        if path is None and self._monitor.first_step is not None:
            path = samples.path_of(self.run.path, self._monitor.first_step)
        if path is None:
            return None
        return samples.competitor(path, self._prompts, self._texts)

    def _rewards(self, completions: Sequence[Completion]) -> np.ndarray:
        """Returns rewards of completions, with the texts of their pairs as info for verifiers."""
        pairs = zip(completions, self._infos, strict=True)
        with_info = [dataclasses.replace(completion, info=info) for completion, info in pairs]
        return finite_rewards(self._reward, with_info, macro="INDICATORS_REWARD")

    @functools.cached_property
    def _reference_reader(self) -> Reader:
        assert self.reference is not None
        if self.reference.model == self._model:
            return self._reader  # one program for both
        return self._reader_of(self.reference.model)

    @functools.cached_property
    def _reference_params(self) -> Any:
        assert self.reference is not None
        return self.reference.read(self.run.program.mesh, self.run.program.rules)

    @functools.cached_property
    def _reference_of_chosen(self) -> np.ndarray:
        readings = self._reference_reader(self._reference_params, self._chosen)
        return np.array([one.mean_log_prob for one in readings])

    def _reader_of(self, model: Any) -> Reader:
        sharding = self.run.program.batch_sharding
        return Reader(model, batch_size=self._batch_size, sharding=sharding, k=self.top_k)

    def _row(self, prompt: Sequence[int], targets: Sequence[int]) -> Row:
        return Row(context=[*self._start, *prompt], targets=targets)

    @property
    def _batches(self) -> int:
        """Number of batches of one evaluation, without the reference's readings of pairs, computed only once."""
        models = 1 if self.reference is None else 2
        pairs = self._reader.batches(2 * len(self._chosen))
        return self._generator.batches + pairs + models * self._reader.batches(len(self._prompts))

    def _ends(self) -> tuple[int, ...]:
        if self.eos_ids is not None:
            return tuple(self.eos_ids)
        return eos_ids(self.vocabulary)

    def _check(self) -> None:
        for name in ("every", "num_pairs", "num_prompts", "batch_size", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"PreferenceIndicators.{name} = {value} must be at least 1.")
        if self.stop not in ("never", "alarm"):
            raise ValueError(
                f"PreferenceIndicators.stop = {self.stop!r}: choose from 'never', 'alarm'."
            )
        if self.vocabulary is None:
            raise ValueError(
                "PreferenceIndicators.vocabulary is None: bind VOCABULARY, the vocabulary of the pairs."
            )
        if not self._ends():
            raise ValueError(
                "PreferenceIndicators: the vocabulary has no EOS, so outputs would not end: give eos_ids."
            )
        if self.competitor is not None and self.reward is None:
            raise ValueError(
                "PreferenceIndicators.competitor is set without a reward to compare it by: bind INDICATORS_REWARD, or set "
                "INDICATORS_COMPETITOR = None."
            )


def _mean(values: Any) -> float:
    return float(np.mean(np.fromiter(values, np.float64)))


@contextlib.contextmanager
def _progress(
    batches: int, name: str, should_stop: Callable[[int], bool]
) -> Iterator[Callable[[], None]]:
    """Shows a bar over the batches of an evaluation that takes long; yields a function to call after each batch.

    The function raises HookInterruptedError if `should_stop`, a `RunContext.should_stop`, returns True after a batch.
    """
    with Bar(
        total=batches,
        desc=name,
        unit="batch",
        leave=False,
        delay=_QUIET_SECONDS,
        disable=jax.process_index() != 0 or None,
    ) as bar:
        counted = itertools.count(1)  # tqdm's own counter stays 0 while the bar is disabled

        def done() -> None:
            bar.update()
            if should_stop(next(counted)):
                raise HookInterruptedError(f"{name} interrupted")

        yield done
