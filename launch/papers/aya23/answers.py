"""Exact answers of a model to held-out instructions in the made languages."""

from collections.abc import Sequence
from typing import Any

from espalier.launch.load import load_run

PER_SOURCE = 16  # instructions of each kind and pair of languages


def exact(checkpoint: str, *, params: str = "auto") -> dict[str, float]:
    """Returns the share of right answers by kind, copy and translate, with the format of turns.

    Answers are greedy. All of a sentence must be right; what follows its end does not count.

    Args:
      checkpoint: run or step directory.
      params: see launch/load/load_run.py.
    """
    asked = _requests()
    with load_run.config_of(checkpoint).load(checkpoint, params=params) as run:
        answers = _continued(
            run, [prompt for _, prompt, _ in asked], max(len(a) for *_, a in asked)
        )
    right: dict[str, list[bool]] = {}
    for (kind, _, wanted), answer in zip(asked, answers, strict=True):
        right.setdefault(kind, []).append(answer.startswith(wanted))
    return {kind: sum(some) / len(some) for kind, some in right.items()}


def _requests() -> list[tuple[str, str, str]]:
    """Returns (kind, prompt, answer) of held-out instructions."""
    from espalier.launch.papers.aya23 import toy_languages

    out = []
    for source in toy_languages.instructions(1, 0):
        prompts, answers = source.requests("validation")
        out += [
            (source.kind, toy_languages.text(prompt), toy_languages.text(answer[:-1]))
            for prompt, answer in zip(prompts[:PER_SOURCE], answers[:PER_SOURCE], strict=True)
        ]
    return out


def _continued(run: Any, prompts: Sequence[str], new_tokens: int) -> list[str]:
    from espalier.trainers.decoding.decoder import Decoder
    from espalier.trainers.decoding.settings import Settings

    decoder = Decoder(
        run.model,
        run.params,
        Settings(max_new_tokens=new_tokens, eos_ids=(), num_ids=run.vocabulary.vocab_size),
        batch_size=run.batch_size(len(prompts), len(prompts)),
        sharding=run.row_sharding,
    )
    continued = decoder([run.context(run.vocabulary.encode(prompt)) for prompt in prompts])
    return [run.vocabulary.decode(one.tokens) for one in continued]
