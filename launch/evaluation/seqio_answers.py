"""What a run's model answers to examples of SeqIO tasks: greedy continuations and log-probabilities."""

from collections.abc import Mapping, Sequence
from typing import Any

from launch.evaluation.lm_eval.arguments import default_batch_tokens, unroll
from launch.evaluation.lm_eval.generation import Generation, Generator
from launch.run.load_run import LoadedRun
from model.kv_cache.full import FullCache
from trainers.decoding.sampling import Sampling
from trainers.scoring.likelihoods import LikelihoodScorer
from trainers.scoring.scoring import Row


class Answers:
    """What a run's model answers to examples of tasks.

    Args:
      run: the model; its layers are unrolled here, once for all that reads them.
      max_new_tokens: of a prediction.
    """

    def __init__(self, run: LoadedRun, max_new_tokens: int):
        unroll(run)
        batch_tokens = default_batch_tokens()
        self._run = run
        self._greedy = Generation(
            until=(), max_gen_toks=max_new_tokens, sampling=Sampling(temperature=0.0)
        )
        self._generator = Generator(
            run,
            ends=run.eos_ids,
            batch_tokens=batch_tokens,
            batch_size=None,
            policy=FullCache(),
            cache_dtype=None,
            prefill_chunk=None,
            seed=0,
        )
        self._scorer = LikelihoodScorer(
            run.model,
            run.params,
            batch_tokens=batch_tokens,
            row_shards=run.row_shards,
            sharding=run.row_sharding,
        )

    def predictions(self, examples: Sequence[Mapping[str, Any]]) -> list[str]:
        """Greedy continuations of the inputs, without the EOS that ends them."""
        return list(self._generator.stream(self._contexts(examples), self._greedy))

    def scores(self, examples: Sequence[Mapping[str, Any]]) -> list[float]:
        """Log-probabilities of the targets after the inputs, summed over tokens."""
        rows = [
            Row(context=context, targets=example["targets"])
            for context, example in zip(self._contexts(examples), examples, strict=True)
        ]
        found = dict(self._scorer.stream(rows))
        return [found[i].log_prob for i in range(len(rows))]

    def _contexts(self, examples: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        run = self._run
        return [run.context(run.after_bos(example["inputs"])) for example in examples]
