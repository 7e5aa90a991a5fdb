"""The evaluation that watches preference optimisation for over-optimisation (arXiv 2410.11677).

docs/preference_indicators.md says what each number is. Readings of held-out pairs and of outputs that the policy
writes in the training loop, on its mesh and with its weights, go into metrics as 'indicators/<name>'.
"""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np

from model.protocol import LanguageModel
from trainers.decoding.decode import Settings
from trainers.decoding.sampling import Sampling
from trainers.hooks import RunContext
from trainers.preference.indicators import held_out, measures, samples
from trainers.preference.indicators.alarm import Alarm, StoppingRule
from trainers.preference.indicators.generator import Generator
from trainers.preference.indicators.judge import Judge
from trainers.preference.indicators.monitor import PREFIX, recovered
from trainers.preference.indicators.progress import progress
from trainers.preference.indicators.reader import Reader
from trainers.preference.indicators.token_readings import TOP_K
from trainers.preference.objectives.reference import LiveReference
from trainers.rewards.base import Completion, Reward, StoredReward
from trainers.scoring.scoring import Row
from trainers.train_state import TrainState

_log = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True)
class PreferenceIndicators:
    """A hook that reads the indicators, keeps samples, and raises an alarm once.

    Of one seed, step and weights all numbers are the same, so that a run that was interrupted writes those of one
    that was not.

    Attributes:
      run: given by `launch.train`.
      pairs: opens the held-out pairs of a task, called with (task=).
      tasks: whose pairs and prompts are read, together.
      vocabulary: of the data; what generation ends with is its EOS.
      every: updates between evaluations; there is one before the first and one after the last.
      num_pairs: held-out pairs at most; None for all.
      num_prompts: prompts of these pairs to write outputs for, at most.
      max_new_tokens: of an output.
      temperature, top_p: of its tokens.
      eos_ids: tokens that end an output, in place of the vocabulary's.
      batch_size: sequences at a time, rounded up to what the mesh divides.
      top_k: tokens that count as the likeliest.
      reference: its log-ratio and L2 distance are measured; None for neither, and no second model in memory.
      reward: judges outputs, read from its checkpoint if it lies in one; None for none. It is told the texts
        'chosen' and 'rejected' of the prompt's pair.
      competitor: a file of outputs that compete with the policy's (see samples.py); None for those of the first
        evaluation, which is before the first update.
      rule: when to raise the alarm.
      stop: 'alarm' ends the run there; 'never' goes on.
      seed: of the draws.

    Raises:
      ValueError: settings that do not fit, no pairs, or a vocabulary without EOS.
      CompetitorError: there are no outputs to compete with.
    """

    run: RunContext
    pairs: Callable[..., held_out.PairStream]
    tasks: Sequence[str]
    vocabulary: Any
    every: int = 50
    num_pairs: int | None = 256
    num_prompts: int = 128
    max_new_tokens: int = 256
    temperature: float = 0.5
    top_p: float | None = 0.75
    eos_ids: Sequence[int] | None = None
    batch_size: int = 16
    top_k: int = TOP_K
    reference: LiveReference | None = None
    reward: Reward | StoredReward | None = None
    competitor: str | None = None
    rule: StoppingRule = StoppingRule()
    stop: Literal["never", "alarm"] = "never"
    seed: int = 0
    at_start: bool = dataclasses.field(default=True, init=False)
    prefix: str = dataclasses.field(default=PREFIX, init=False)

    def __post_init__(self):
        self._check()
        data = held_out.read(
            self.pairs, self.tasks, num_pairs=self.num_pairs, num_prompts=self.num_prompts
        )
        self._prompts, self._start = data.prompts, data.start
        if not self._start and not all(self._prompts):
            raise ValueError(
                "PreferenceIndicators: a held-out prompt is empty and nothing is read before it. Set DOCUMENT_START."
            )
        self._chosen = [self._row(pair.prompt, pair.chosen) for pair in data.pairs]
        self._rejected = [self._row(pair.prompt, pair.rejected) for pair in data.pairs]
        self._texts = samples.Texts(self.vocabulary, frozenset(self._ends()))
        program = self.run.program
        self._trained = cast(LanguageModel, self.run.recipe.model)
        self._model = model = self._trained.inference_model
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
            for pair in data.asked
        ]
        self._monitor = recovered(
            self.rule, os.path.join(self.run.path, "metrics.jsonl"), self.run.step
        )
        reward = self.reward
        if isinstance(reward, StoredReward):
            reward = reward.on(program.mesh, program.rules)
        self._judge = None if reward is None else Judge(reward, self._competing())

    @property
    def ended(self) -> bool:
        """Whether the run is to end where it is."""
        return self.stop == "alarm" and self._monitor.alarm is not None

    def __call__(
        self, step: int, state: TrainState, metrics: Mapping[str, float]
    ) -> Mapping[str, float]:
        del metrics
        params = self._trained.inference_params(state.released_params)
        with progress(self._batches, f"indicators at step {step}", self.run.give_up) as done:
            found = self._of_pairs(params, done)
            outputs = self._generator(params, step, done=done)
            found |= self._of_outputs(params, step, outputs, done)
        found |= self._judged(step, found)
        return {PREFIX + name: value for name, value in found.items() if not np.isnan(value)}

    def _of_pairs(self, params: Any, done: Callable[[], None]) -> dict[str, float]:
        """What the policy says of held-out completions."""
        readings = self._reader(params, [*self._chosen, *self._rejected], done=done)
        chosen, rejected = readings[: len(self._chosen)], readings[len(self._chosen) :]
        likely, unlikely = (_mean(one.mean_log_prob for one in side) for side in (chosen, rejected))
        found = {
            "llh_chosen": likely,
            "llh_rejected": unlikely,
            "llh_gap": likely - unlikely,
            "entropy_chosen": _mean(one.entropy for one in chosen),
            "mass_chosen": _mean(one.mass for one in chosen),
        }
        if self.reference is not None:
            found["llh_distance"] = measures.likelihood_distance(
                np.array([one.mean_log_prob for one in chosen]), self._reference_of_chosen
            )
        return found

    def _of_outputs(
        self, params: Any, step: int, outputs: Sequence[list[int]], done: Callable[[], None]
    ) -> dict[str, float]:
        """What the policy writes, and what it, the reference and the reward say of that."""
        rows = [self._row(*pair) for pair in zip(self._prompts, outputs, strict=True)]
        readings = self._reader(params, rows, done=done)
        pairs = zip(self._prompts, outputs, strict=True)
        completions = [self._texts.completion(prompt, tokens) for prompt, tokens in pairs]
        numbers: list[dict[str, float]] = [
            {"entropy": one.entropy, "mass": one.mass} for one in readings
        ]
        found = {
            "entropy": _mean(one.entropy for one in readings),
            "mass": _mean(one.mass for one in readings),
            "ead": measures.diversity(
                [one.tokens for one in completions], vocab_size=self._num_ids
            ),
            "length": _mean(one.length for one in readings),
            "ended": _mean(one.ended for one in completions),
        }
        if self.reference is not None:
            theirs = self._reference_reader(self._reference_params, rows, done=done)
            ours_N, theirs_N = (
                np.array([one.log_prob for one in side]) for side in (readings, theirs)
            )
            found["kl"] = measures.sampled_divergence(ours_N, theirs_N)
            for row, ratio in zip(numbers, ours_N - theirs_N, strict=True):
                row["log_ratio"] = float(ratio)
        if self._judge is not None:
            rewards_N = self._judge.rewards(self._told(completions))
            found["reward"] = float(np.mean(rewards_N, dtype=np.float64))
            found["p_win"] = self._judge.win_probability(rewards_N)
            for row, reward in zip(numbers, rewards_N, strict=True):
                row["reward"] = float(reward)
        if self.run.writer:
            written = zip(completions, numbers, strict=True)
            samples.write(self.run.path, step, [self._texts.row(c, **n) for c, n in written])
        return found

    def _judged(self, step: int, found: Mapping[str, float]) -> dict[str, float]:
        """What the rule says, and by what the checkpoint of this step is kept or not."""
        raised = self._monitor.add(step, found)
        if raised is not None and self.run.writer:
            _log.warning(self._advice(raised))
        judged = {"alarm": float(self._monitor.alarm is not None)}
        if self.reward is not None:
            judged["retain"] = found["reward"]
        elif self._monitor.alarm is None:
            judged["retain"] = float(step)  # the last before the alarm
        return judged

    def _advice(self, alarm: Alarm) -> str:
        kept = "the best mean reward" if self.reward is not None else f"step {alarm.before}"
        end = (
            "The run ends here."
            if self.stop == "alarm"
            else "The run goes on; INDICATORS_STOP = 'alarm' would end it here."
        )
        return (
            f"step {alarm.step}: signs of over-optimisation: {alarm.reason}. {end} Release the checkpoint of {kept} (kept "
            "where checkpoints are as frequent as indicators), or train again with a larger BETA, an NLL term in "
            "LOSSES or a lower LEARNING_RATE."
        )

    def _competing(self) -> list[Completion] | None:
        """The competitor's outputs; None where they are yet to be written, in the first evaluation."""
        path: str | os.PathLike | None = self.competitor
        if path is None and self._monitor.first_step is not None:
            path = samples.path_of(self.run.path, self._monitor.first_step)
        if path is None:
            return None
        return self._told(samples.competitor(path, self._prompts, self._texts))

    def _told(self, completions: Sequence[Completion]) -> list[Completion]:
        """The completions of all prompts with the texts of their pairs, for verifiers."""
        pairs = zip(completions, self._infos, strict=True)
        return [dataclasses.replace(completion, info=info) for completion, info in pairs]

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
        """Of one evaluation; those of the reference's first are left out."""
        models = 1 if self.reference is None else 2
        pairs = self._reader.batches(2 * len(self._chosen))
        return self._generator.batches + pairs + models * self._reader.batches(len(self._prompts))

    def _ends(self) -> tuple[int, ...]:
        if self.eos_ids is not None:
            return tuple(self.eos_ids)
        ids = getattr(self.vocabulary, "eos_ids", None) or (self.vocabulary.eos_id,)
        return tuple(id for id in ids if id not in (None, -1))

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
                "PreferenceIndicators.vocabulary is None: bind VOCABULARY, that of the pairs."
            )
        if not self._ends():
            raise ValueError(
                "PreferenceIndicators: the vocabulary has no EOS, so that outputs would not end: give eos_ids."
            )
        if self.competitor is not None and self.reward is None:
            raise ValueError(
                "PreferenceIndicators.competitor without a reward: nothing compares with it. Bind INDICATORS_REWARD, "
                "or leave INDICATORS_COMPETITOR None."
            )


def _mean(values: Any) -> float:
    return float(np.mean(np.fromiter(values, np.float64)))
