"""Answers of a model of the small experiment to held-out requests, by language, and its divergence from another model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.load import load_run
from espalier.launch.papers.aya_expanse import lexicon
from espalier.launch.papers.aya_expanse.small_pool import DEVIATION, NEW_TOKENS

HELD_OUT = 48  # requests in each language, the same for all seeds
SAMPLED = 12  # requests in each language of which answers are drawn, for a divergence
JUDGED_DIGITS = 3
_BATCH = 128


def score(checkpoint: str, *, params: str = "auto") -> dict[str, Any]:
    """Returns how good greedy answers are.

    Args:
      checkpoint: run or step directory.
      params: see launch/load/load_run.py.

    Returns:
      {'score', 'artefacts', 'words': {language: mean}, 'kinds': {kind: mean score}, 'judge': {language: [a judge's score of
      each answer]}}: exact scores, the share of words of the other language of the family, the number of words, and
      exact scores with the noise of a judge that no model is trained on.
    """
    rows = lexicon.requests("held_out", HELD_OUT, 0)
    with load_run.config_of(checkpoint).load(checkpoint, params=params) as run:
        texts = [one["text"] for one in _answered(run, rows, temperature=0.0)]
    exact = [
        lexicon.score(text, row["answer"], row["language"])
        for text, row in zip(texts, rows, strict=True)
    ]
    artefacts = [lexicon.artefacts(t, row["language"]) for t, row in zip(texts, rows, strict=True)]
    words = [float(text.count(",") + 1) for text in texts]
    judge: dict[str, list[float]] = {code: [] for code in lexicon.LANGUAGES}
    for row, text in zip(rows, texts, strict=True):
        judged = lexicon.noisy_score(text, row, deviation=DEVIATION, name="judge")
        judge[row["language"]].append(round(judged, JUDGED_DIGITS))
    return {
        "score": _means(rows, exact, "language"),
        "artefacts": _means(rows, artefacts, "language"),
        "words": _means(rows, words, "language"),
        "kinds": _means(rows, exact, "kind"),
        "judge": judge,
    }


def divergence(checkpoint: str, *, params: str = "auto") -> float:
    """Returns the mean over requests of KL(model || the model that it started from), in nats, estimated by drawn answers."""
    from espalier.launch.inference.score import scored_row
    from espalier.trainers.scoring.scoring import Scorer

    rows = lexicon.requests("held_out", SAMPLED, 0)
    with load_run.config_of(checkpoint).load(checkpoint, params=params) as run:
        answers = _answered(run, rows, temperature=1.0)
        own = [float(sum(one["logprobs"])) for one in answers]
    before = parent(checkpoint)
    asked = [
        {"text": row["prompt"], "targets": one["tokens"]}
        for row, one in zip(rows, answers, strict=True)
    ]
    with load_run.config_of(before).load(before, params=params) as run:
        scored = [scored_row(run, row, "an answer") for row in asked]
        size = run.batch_size(_BATCH, len(scored))
        scorer = Scorer(run.model, run.params, batch_size=size, sharding=run.row_sharding)
        other = [float(logp_T.sum()) for logp_T in scorer(scored)]
    return float(np.mean(np.array(own) - np.array(other)))


def parent(checkpoint: str) -> str:
    """Returns the step that a run started from; raises ValueError for one that started from new parameters."""
    from espalier.trainers.checkpoints import step_dir

    start = step_dir.read_record(step_dir.resolve(checkpoint))["meta"].get("initial", {})
    if "path" not in start:
        raise ValueError(
            f"{checkpoint} started from new parameters: give a run that continues another."
        )
    return str(start["path"])


def _answered(run: Any, rows: Sequence[Mapping[str, str]], *, temperature: float) -> list[Any]:
    """Returns what launch.generate would write for the requests."""
    from espalier.launch.inference import generate
    from espalier.trainers.decoding.settings import Sampling, Settings

    settings = Settings(max_new_tokens=NEW_TOKENS, sampling=Sampling(temperature=temperature))
    decoding = generate.Decoding(settings=settings, batch_size=_BATCH)
    decoder, texts = generate.decoder_and_texts(run, decoding, rows=len(rows))
    asked = [(row["id"], {"text": row["prompt"]}) for row in rows]
    return list(generate.continued(run, decoder, texts, asked, num_samples=1, seed=0))


def _means(
    rows: Sequence[Mapping[str, str]], values: Sequence[float], column: str
) -> dict[str, float]:
    names = dict.fromkeys(row[column] for row in rows)
    return {
        name: float(
            np.mean([v for v, row in zip(values, rows, strict=True) if row[column] == name])
        )
        for name in names
    }
