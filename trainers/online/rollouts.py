"""Batches of completions that the policy samples during training, with their rewards.

The training loop requests the batch of a step with the state before that step. A rollout is a function of (parameters,
seed, number of the rollout), so a resumed run trains on the same samples. If a rollout is used for several updates, its
batch is stored in the run's directory, because a run may resume from a checkpoint between two of these updates.

Shapes: P prompts, G samples of each, R = P G completions, T prompt length, B rows, L length.
"""

import functools
import os
import pathlib
import zipfile
from typing import Any, Protocol, cast

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from espalier.common.end_tokens import eos_ids
from espalier.common.ranges import Fraction, NonNegative, Seed, Size
from espalier.common.storage import output_files
from espalier.trainers import batches
from espalier.trainers.decoding.policy_sampler import PolicySampler, placed
from espalier.trainers.decoding.sampling import Sampling
from espalier.trainers.decoding.settings import Settings
from espalier.trainers.objectives.base import Objective
from espalier.trainers.objectives.forward import frozen_forward
from espalier.trainers.objectives.frozen_model import FrozenModel
from espalier.trainers.objectives.own_base import OwnBase
from espalier.trainers.online.method import LOG_PROBS, REFERENCE, VALUES, Arrays, Method, Samples
from espalier.trainers.online.policy_gradient import PolicyGradient
from espalier.trainers.recipe import Program, Recipe
from espalier.trainers.rewards.base import Completion, Reward, StoredReward, finite_rewards, on_mesh
from espalier.trainers.train_state import TrainState

_STORED = 64  # newest rollouts in the run's directory; resuming may need one of them


class RolloutError(ValueError):
    """Settings that contradict each other, or a stored rollout that cannot be read."""


class Prompts(batches.Stream, Protocol):
    """A stream of prompts, such as the one in data/prompts/stream.py."""

    updates: int

    def info(self, step: int, lo: int, hi: int) -> list[dict[str, Any]]:
        """Returns the data row of each prompt, without the text of the prompt."""


class Rollouts:
    """The `trainers.batches.Feed` of sampled completions, made by a `trainers.hooks.FeedFactory`.

    Args:
      program: the run's recipe on its mesh; the recipe's inputs are a `trainers.online.method.Method`.
      folder: directory for rollouts that are used for several updates.
      reward: scores completions on the host; every process scores all of them.
      vocabulary: its EOS ends completions, and only its ids are sampled.
      reference: the reference model, if the method needs its log-probabilities.
      temperature, top_k, top_p: sampling settings, see trainers/decoding/settings.py. A policy gradient has the same
        temperature, and no others: its log-probabilities are those of all tokens. Other objectives, such as losses of pairs,
        take samples of any kind, with log-probabilities at temperature 1.
      missing_end_penalty: subtracted from the reward of a completion that was cut at the maximum length.

    Raises:
      RolloutError: settings that contradict each other, or no reference where the method needs one.
      ValueError: a reference that does not match the run, see `FrozenModel.check`.
    """

    part = "generation"
    of_state = True

    def __init__(
        self,
        *,
        stream: Prompts,
        program: Program,
        folder: str | os.PathLike,
        reward: Reward | StoredReward,
        vocabulary: Any,
        reference: FrozenModel | OwnBase | None = None,
        temperature: NonNegative = 1.0,
        top_k: Size | None = None,
        top_p: Fraction | None = None,
        missing_end_penalty: NonNegative = 0.0,
        seed: Seed = 0,
    ):
        recipe = program.recipe
        method = _method(recipe, stream, reference)
        data = stream.summary()
        meta = {"vocabulary": data["vocabulary"]["digest"], "start_token": data["start_token"]}
        if REFERENCE in method.scores:
            assert reference is not None  # see _method
            reference.check(program.mesh, program.rules, meta)
            reference.check_trained(program.abstract_state.params, program.mask)
        size = program.mesh.size
        if stream.batch_size % (parts := size // program.batch_sharding.shard_shape((size,))[0]):
            raise RolloutError(
                f"PROMPTS = {stream.batch_size} do not divide over the {parts} parts of a batch on this mesh: change PROMPTS, or "
                "MESH."
            )
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        self._temperature = _scored_temperature(recipe, sampling)
        settings = Settings(
            max_new_tokens=method.completion_length,
            sampling=sampling,
            eos_ids=eos_ids(vocabulary),
            num_ids=vocabulary.vocab_size,
            num_samples=method.samples,
        )
        self._stream, self._recipe, self._program = stream, recipe, program
        self._method, self._reference = method, reference
        self._reward = on_mesh(reward, program.mesh, program.rules, meta=meta, folder=folder)
        self._penalty = missing_end_penalty
        self._folder = pathlib.Path(folder)
        self._sharding = program.batch_sharding
        self._sampler = PolicySampler(recipe.model, settings, sharding=self._sharding, seed=seed)
        everywhere = NamedSharding(program.mesh, PartitionSpec())
        self._score_fn = jax.jit(self._score_rows, out_shardings=everywhere)
        # The number of the rollout in use, and its batch.
        self._current: tuple[int, dict[str, jax.Array]] | None = None

    @property
    def units(self) -> int:
        """Number of tokens of a batch, for throughput metrics."""
        return self._recipe.units_per_batch

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes, dtypes and shardings of batches."""
        return self._recipe.abstract_batch(self._sharding)

    def get(self, step: int, state: TrainState) -> dict[str, jax.Array]:
        """Returns the batch of a step; `state` is the train state before the step.

        Raises:
          RolloutError: a stored rollout that cannot be read.
          ValueError: rewards that are not finite numbers.
        """
        number, updates_before = divmod(step, self._method.updates)
        if self._current is None or self._current[0] != number:
            self._current = None  # frees its memory first
            if updates_before:
                arrays = self._read(number)
            else:
                arrays = self._make(number, step, state.params)
            self._current = number, self._placed(arrays)
        return self._current[1]

    def close(self) -> None:
        """Does nothing: there is no background thread."""

    def _make(self, number: int, step: int, params: Any) -> Arrays:
        size = self._stream.batch_size
        prompts = self._stream.batch(step, 0, size)
        tokens_PT, lengths_P = prompts["prompt_tokens"], prompts["prompt_lengths"]
        completions = self._sampler(params, tokens_PT, lengths_P, number=number)
        texts = [row[:n].tolist() for row, n in zip(tokens_PT, lengths_P, strict=True)]
        shape = (size, self._method.samples)
        ended_R = np.array([self._sampler.ended(tokens) for tokens in completions])
        info = self._stream.info(step, 0, size)
        rewards_R = self._rewards(texts, completions, ended_R, info)
        samples = Samples(
            prompts=texts,
            completions=completions,
            rewards_PG=rewards_R.reshape(shape),
            ended_PG=ended_R.reshape(shape),
            sources_P=prompts["source_ids"],
            info_P=info,
        )
        arrays = self._method.batch(samples, lambda columns: self._score(params, columns))
        if self._method.updates > 1:
            self._store(number, arrays)
        return arrays

    def _rewards(
        self,
        prompts: list[list[int]],
        completions: list[list[int]],
        ended_R: np.ndarray,
        info: list[dict[str, Any]],
    ) -> np.ndarray:
        """Returns rewards minus the penalty for missing ends, float32 [R]."""
        copies = self._method.samples
        start = self._stream.summary()["start_token"]
        completed = [
            Completion(
                prompt=prompts[r // copies][int(start is not None) :],
                tokens=tokens[:-1] if ended else tokens,
                ended=bool(ended),
                info=info[r // copies],
            )
            for r, (tokens, ended) in enumerate(zip(completions, ended_R, strict=True))
        ]
        rewards_R = finite_rewards(self._reward, completed)
        return rewards_R - np.float32(self._penalty) * ~ended_R

    def _score(self, params: Any, columns: Any) -> Arrays:
        """Returns the scores that the method needs, computed from token columns."""
        reference_params = self._reference_params if REFERENCE in self._method.scores else None
        read = [name for name in columns if name.startswith(("encoder_", "decoder_"))]
        batch = self._placed({name: columns[name] for name in read})
        return jax.device_get(self._score_fn(params, reference_params, batch))

    @functools.cached_property
    def _reference_params(self) -> Any:
        assert self._reference is not None  # see _method
        return self._reference.read(self._program.mesh, self._program.rules)

    def _placed(self, arrays: Arrays) -> dict[str, jax.Array]:
        return {name: placed(array, self._sharding) for name, array in arrays.items()}

    def _score_rows(self, params: Any, reference_params: Any, batch: Any) -> dict[str, jax.Array]:
        needed, scores = self._method.scores, {}
        if needed & {LOG_PROBS, VALUES}:
            out = frozen_forward(self._recipe.model, params, batch)
            scores[LOG_PROBS] = out.log_probs_BT(temperature=self._temperature)
            if VALUES in needed:
                scores[VALUES] = out.apply("values", out.output.hidden_BTD)
        if REFERENCE in needed:
            assert self._reference is not None
            out = self._reference.forward(reference_params, batch, params)
            scores[REFERENCE] = out.log_probs_BT(temperature=self._temperature)
        return scores

    def _store(self, number: int, arrays: Arrays) -> None:
        if jax.process_index():
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with output_files.opened(self._path(number)) as file:
            np.savez(file, **cast(Any, arrays))
        self._path(number - _STORED).unlink(missing_ok=True)

    def _read(self, number: int) -> Arrays:
        path = self._path(number)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise RolloutError(
                f"The rollout {path} cannot be read ({error}). Resume from a checkpoint whose step is a multiple of "
                f"UPDATES = {self._method.updates}, or start in another MODEL_DIR."
            ) from None

    def _path(self, number: int) -> pathlib.Path:
        return self._folder / f"{number}.npz"


def _scored_temperature(recipe: Recipe, sampling: Sampling) -> float:
    """Returns the temperature of log-probabilities; raises RolloutError for samples of another distribution than theirs."""
    objective = Objective.of(recipe.objective(model=recipe.model, num_sources=0))
    if not isinstance(objective, PolicyGradient):
        return 1.0
    if sampling.restricted:
        raise RolloutError(
            f"TOP_P = {sampling.top_p} and Rollouts.top_k = {sampling.top_k} draw samples from a part of the tokens, but a "
            "policy gradient learns from the probabilities of all: set both to None. TEMPERATURE may differ from 1."
        )
    if sampling.temperature != objective.temperature:
        raise RolloutError(
            f"Rollouts.temperature is {sampling.temperature}, but the objective's log-probabilities have temperature "
            f"{objective.temperature}: set TEMPERATURE, which binds both."
        )
    return objective.temperature


def _method(recipe: Recipe, stream: Prompts, reference: FrozenModel | OwnBase | None) -> Method:
    """Returns the recipe's method; raises RolloutError if recipe, prompts or reference do not match it."""
    method = recipe.inputs_spec
    if not isinstance(method, Method):
        raise RolloutError(
            f"Recipe.inputs = {method} is not a method of trainers/online/, but the run has rollouts: give a file of "
            "methods/preference/ such as online_dpo.gin or grpo.gin."
        )
    if recipe.model.row.encodes and stream.summary()["start_token"] is None:
        raise RolloutError(
            "DOCUMENT_START is None, and the targets of an encoder-decoder follow a start token: set it, to 0 for T5."
        )
    limit = recipe.language_model.max_length
    longest = method.prompt_length + method.completion_length - 1
    if limit is not None and longest > limit:
        raise RolloutError(
            f"MAX_PROMPT_LENGTH and MAX_NEW_TOKENS make texts of {longest} tokens, but the model has learned only {limit} "
            "positions: lower them."
        )
    rows = stream.batch_size * method.rows_per_prompt
    if recipe.batch_size != rows:
        raise RolloutError(
            f"BATCH_SIZE = {recipe.batch_size} is not PROMPTS = {stream.batch_size} times {method.rows_per_prompt} rows of "
            "each prompt: change one of them."
        )
    for name, ours, theirs in (
        ("MAX_PROMPT_LENGTH", method.prompt_length, stream.length),
        ("UPDATES", method.updates, stream.updates),
    ):
        if ours != theirs:
            raise RolloutError(
                f"{name} is {ours} for the method, but {theirs} for the prompts: bind one number."
            )
    if REFERENCE in method.scores and reference is None:
        raise RolloutError(
            "The method needs a reference, but there is none: bind Rollouts.reference, or set KL or BETA to 0."
        )
    return method
