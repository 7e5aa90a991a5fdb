"""Batches that a policy makes for itself while it is trained: sampled, rewarded, and arranged by a method.

The loop asks for the batch of a step with the state at that step. A rollout is a function of (parameters, seed, number
of the rollout), so that a run that goes on from a checkpoint trains on what it would have; where a rollout is used
for several updates, a checkpoint may lie between them, and the batch is kept in the run's directory for that case.

Shapes: P prompts, G samples of each, R = P G completions, T prompt length, B rows, L length.
"""

import os
import pathlib
from typing import Any, Protocol, cast

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from model.protocol import LanguageModel
from trainers import batches
from trainers.decoding import decode
from trainers.decoding.policy_sampler import PolicySampler
from trainers.decoding.sampling import Sampling
from trainers.online.method import LOG_PROBS, REFERENCE, VALUES, Method, Samples
from trainers.online.rows import Arrays
from trainers.preference.objectives.reference import LiveReference
from trainers.recipe import Program, Recipe
from trainers.rewards.base import Completion, Reward, StoredReward
from trainers.scoring.target_log_probs import read_targets
from trainers.train_state import TrainState

_KEPT = 64  # rollouts, of which a checkpoint may need one again


class RolloutError(ValueError):
    """Settings of rollouts that do not go together, rewards that are none, or a rollout that is gone."""


class Prompts(batches.Stream, Protocol):
    """A stream of prompts, as data/prompts/stream.py has it."""

    updates: int

    def info(self, step: int, lo: int, hi: int) -> list[dict[str, Any]]:
        """What is known of each prompt."""
        ...


class Rollouts:
    """Batches of sampled completions, in place of a `trainers.batches.Prefetcher`.

    Args:
      stream: of prompts.
      recipe: of the run, whose inputs are a `trainers.online.method.Method`.
      program: of the recipe.
      folder: where rollouts are kept that are used for several updates.
      reward: judges completions, on the host; every process judges all of them.
      vocabulary: whose EOS ends completions, and whose ids are sampled.
      reference: that the policy is compared with, if the method asks for one.
      temperature, top_k, top_p: of sampling; see trainers/decoding/sampling.py. Log-probabilities are those at temperature 1.
      missing_end_penalty: taken off the reward of a completion that was cut at the longest length.
      seed: of the draws.

    Raises:
      RolloutError: sizes that do not fit each other, or no reference where one is asked for.
    """

    part = "generation"
    of_state = True

    def __init__(
        self,
        *,
        stream: Prompts,
        recipe: Recipe,
        program: Program,
        folder: str | os.PathLike,
        reward: Reward | StoredReward,
        vocabulary: Any,
        reference: LiveReference | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        missing_end_penalty: float = 0.0,
        seed: int = 0,
    ):
        method = _method(recipe, stream, reference)
        ends = getattr(vocabulary, "eos_ids", None) or (vocabulary.eos_id,)
        settings = decode.Settings(
            max_new_tokens=method.completion_length,
            sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p),
            eos_ids=tuple(id for id in ends if id not in (None, -1)),
            num_ids=vocabulary.vocab_size,
            num_samples=method.samples,
        )
        self._stream, self._recipe, self._program = stream, recipe, program
        self._method, self._reference = method, reference
        if isinstance(reward, StoredReward):
            reward = reward.on(program.mesh, program.rules)
        self._reward: Reward = reward
        self._penalty = missing_end_penalty
        self._folder = pathlib.Path(folder)
        self._sharding = program.batch_sharding
        self._sampler = PolicySampler(recipe.model, settings, sharding=self._sharding, seed=seed)
        everywhere = NamedSharding(program.mesh, PartitionSpec())
        self._told = jax.jit(self._tell, out_shardings=everywhere)
        self._reference_params: Any = None
        self._held: tuple[int, dict[str, jax.Array]] | None = None

    @property
    def units(self) -> int:
        """Tokens of a batch, as rates count them."""
        return self._recipe.batch_size * self._recipe.length

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of batches."""
        return self._recipe.abstract_batch(self._sharding)

    def get(self, step: int, state: TrainState) -> dict[str, jax.Array]:
        """The batch of a step, of which `state` is the state before it.

        Raises:
          RolloutError: rewards that are not finite numbers, or a rollout that is gone.
        """
        number, again = divmod(step, self._method.updates)
        if self._held is None or self._held[0] != number:
            self._held = None
            arrays = self._read(number) if again else self._make(number, step, state.params)
            self._held = number, {name: self._placed(array) for name, array in arrays.items()}
        return self._held[1]

    def close(self) -> None:
        """Nothing runs beside the loop."""

    def _make(self, number: int, step: int, params: Any) -> Arrays:
        size = self._stream.batch_size
        prompts = self._stream.batch(step, 0, size)
        tokens_PT, lengths_P = prompts["prompt_tokens"], prompts["prompt_lengths"]
        self._check_room()
        found = self._sampler(params, tokens_PT, lengths_P, number=number)
        texts = [row[:n].tolist() for row, n in zip(tokens_PT, lengths_P, strict=True)]
        shape = (size, self._method.samples)
        ended_R = np.array([self._sampler.ended(tokens) for tokens in found])
        rewards_R = self._rewards(texts, found, ended_R, self._stream.info(step, 0, size))
        samples = Samples(
            prompts=texts,
            completions=found,
            rewards_PG=rewards_R.reshape(shape),
            ended_PG=ended_R.reshape(shape),
            sources_P=prompts["source_ids"],
        )
        arrays = self._method.batch(samples, lambda columns: self._score(params, columns))
        if self._method.updates > 1:
            self._keep(number, arrays)
        return arrays

    def _rewards(
        self,
        prompts: list[list[int]],
        found: list[list[int]],
        ended_R: np.ndarray,
        info: list[dict[str, Any]],
    ) -> np.ndarray:
        """float32 [R], with what missing ends cost."""
        copies = self._method.samples
        start = self._stream.summary()["start_token"]
        told = [
            Completion(
                prompt=prompts[r // copies][int(start is not None) :],
                tokens=tokens[:-1] if ended else tokens,
                ended=bool(ended),
                info=info[r // copies],
            )
            for r, (tokens, ended) in enumerate(zip(found, ended_R, strict=True))
        ]
        rewards_R = np.asarray(self._reward(told), np.float32)
        if rewards_R.shape != (len(told),) or not np.isfinite(rewards_R).all():
            raise RolloutError(
                f"REWARD gave {rewards_R.shape} for {len(told)} completions, finite: "
                f"{bool(np.isfinite(rewards_R).all())}. A reward gives one finite number for each."
            )
        return rewards_R - np.float32(self._penalty) * ~ended_R

    def _score(self, params: Any, columns: Any) -> Arrays:
        """What the method asks for, of the tokens of rows."""
        if REFERENCE in self._method.asks and self._reference_params is None:
            assert self._reference is not None  # see _method
            mesh, rules = self._program.mesh, self._program.rules
            self._reference_params = self._reference.read(mesh, rules)
        batch = {name: self._placed(columns[name]) for name in columns if "decoder" in name}
        return jax.device_get(self._told(params, self._reference_params, batch))

    def _tell(self, params: Any, reference_params: Any, batch: Any) -> dict[str, jax.Array]:
        asks, told = self._method.asks, {}
        if asks & {LOG_PROBS, VALUES}:
            read = read_targets(self._recipe.model, {"params": params}, batch)
            told[LOG_PROBS] = read.log_probs_BT
            if VALUES in asks:
                told[VALUES] = self._recipe.model.apply(
                    {"params": params}, read.hidden_BTD, method="values"
                )
        if REFERENCE in asks:
            assert self._reference is not None
            read = read_targets(self._reference.model, {"params": reference_params}, batch)
            told[REFERENCE] = read.log_probs_BT
        return told

    def _placed(self, array: np.ndarray) -> jax.Array:
        """On the mesh, by rows; every process has the whole."""
        return jax.make_array_from_callback(array.shape, self._sharding, lambda index: array[index])

    def _check_room(self) -> None:
        limit = cast(LanguageModel, self._recipe.model).max_length
        longest = self._method.prompt_length + self._method.completion_length - 1
        if limit is not None and longest > limit:
            raise RolloutError(
                f"MAX_PROMPT_LENGTH and MAX_NEW_TOKENS make rows of {longest} tokens, and the model has learned "
                f"{limit} positions: lower them."
            )

    def _keep(self, number: int, arrays: Arrays) -> None:
        if jax.process_index():
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(number)
        partial = path.with_suffix(".partial")
        with open(partial, "wb") as file:
            np.savez(file, **cast(Any, arrays))
        os.replace(partial, path)
        self._path(number - _KEPT).unlink(missing_ok=True)

    def _read(self, number: int) -> Arrays:
        path = self._path(number)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError) as error:
            raise RolloutError(
                f"{path}, from which the run would go on, cannot be read ({error}). Go on from a checkpoint whose step "
                f"is a multiple of UPDATES = {self._method.updates}, or begin in another MODEL_DIR."
            ) from None

    def _path(self, number: int) -> pathlib.Path:
        return self._folder / f"{number}.npz"


def _method(recipe: Recipe, stream: Prompts, reference: LiveReference | None) -> Method:
    """The recipe's method, checked against all that must agree with it."""
    if not hasattr(recipe.reads, "asks"):
        raise RolloutError(
            "The run samples, and Recipe.inputs is no method of trainers/online/: give a file of methods/ such as "
            "online_dpo.gin or grpo.gin."
        )
    method = cast(Method, recipe.reads)
    rows = stream.batch_size * method.rows_per_prompt
    if recipe.batch_size != rows:
        raise RolloutError(
            f"BATCH_SIZE = {recipe.batch_size} rows are not those of {stream.batch_size} prompts (PROMPTS), "
            f"{method.rows_per_prompt} for each: set one of them."
        )
    for name, ours, theirs in (
        ("MAX_PROMPT_LENGTH", method.prompt_length, stream.length),
        ("UPDATES", method.updates, stream.updates),
    ):
        if ours != theirs:
            raise RolloutError(f"{name} is {ours} for the method, but {theirs} for the prompts.")
    if REFERENCE in method.asks and reference is None:
        raise RolloutError(
            "The method compares with a reference, and there is none: bind Rollouts.reference, or set KL or BETA to 0."
        )
    return method
