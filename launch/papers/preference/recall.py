"""Recall of the facts of the generated language, which no preference concerns."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from espalier.common.ranges import Count, Size
from espalier.launch.papers.preference import topic_language
from espalier.model.protocol import inference_model, inference_params
from espalier.trainers.decoding.policy_sampler import Generator
from espalier.trainers.decoding.sampling import Sampling
from espalier.trainers.decoding.settings import Settings
from espalier.trainers.hooks import Hook, RunContext
from espalier.trainers.train_state import TrainState


@dataclasses.dataclass(kw_only=True)
class FactRecall(Hook):
    """A hook: 'facts/accuracy', the share of facts that the likeliest continuations of their prompts state.

    Attributes:
      run: set by `espalier train`.
      vocabulary: of the language's symbols.
      start_token: read before each prompt; None for none.
      every: updates between evaluations; there is one before the first and one after the last.
    """

    run: RunContext
    vocabulary: Any
    start_token: Count | None = 0
    every: Size = 20
    at_start = True
    prefix = "facts/"

    def __post_init__(self):
        before = [] if self.start_token is None else [self.start_token]
        end = self.vocabulary.eos_id
        facts = topic_language.facts()
        self._answers = [[*self.vocabulary.encode(answer), end] for answer in facts.values()]
        sharding = self.run.program.batch_sharding
        devices = sharding.mesh.devices.size
        self._generator = Generator(
            inference_model(self.run.program.recipe.language_model),
            [[*before, *self.vocabulary.encode(prompt)] for prompt in facts],
            Settings(
                max_new_tokens=topic_language.ANSWER + 1,
                sampling=Sampling(temperature=0.0),
                eos_ids=(end,),
                num_ids=self.vocabulary.vocab_size,
            ),
            batch_size=-(-len(facts) // devices) * devices,
            sharding=sharding,
            seed=0,
        )

    def __call__(
        self, step: int, state: TrainState, metrics: Mapping[str, float]
    ) -> Mapping[str, float]:
        del metrics
        params = inference_params(self.run.program.recipe.language_model, state.released_params)
        outputs = self._generator(params, step)
        right = [output == answer for output, answer in zip(outputs, self._answers, strict=True)]
        return {f"{self.prefix}accuracy": sum(right) / len(right)}
