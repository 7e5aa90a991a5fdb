"""Answers of a model of the small experiment to held-out requests, by language."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.load import load_run
from espalier.launch.papers.aya_expanse import lexicon
from espalier.launch.papers.aya_expanse.small_pool import DEVIATION, NEW_TOKENS

HELD_OUT = 480  # requests in each language, the same for all seeds
JUDGED_DIGITS = 3
_BATCH = 512


def score(checkpoint: str, *, params: str = "auto") -> dict[str, Any]:
    """Returns how good greedy answers are.

    Args:
      checkpoint: run or step directory.
      params: see launch/load/load_run.py.

    Returns:
      {'score', 'loss', 'artefacts', 'words': {language: mean}, 'kinds': {kind: mean score}, 'judge': {language: [a judge's
      score of each answer]}}: exact scores, the negative log-probability of the reference, the share of words of the other
      language of the family, the number of words, and exact scores with the noise of a judge that no model is trained on.
    """
    rows = lexicon.requests("held_out", HELD_OUT, 0)
    with load_run.config_of(checkpoint).load(checkpoint, params=params) as run:
        texts = [one["text"] for one in _answered(run, rows)]
        references = [{"text": row["prompt"], "targets": row["answer"]} for row in rows]
        losses = [-value for value in _log_probs(run, references)]
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
        "loss": _means(rows, losses, "language"),
        "artefacts": _means(rows, artefacts, "language"),
        "words": _means(rows, words, "language"),
        "kinds": _means(rows, exact, "kind"),
        "judge": judge,
    }


def _log_probs(run: Any, rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Returns the log-probability of the targets of each row after its text."""
    from espalier.launch.inference.score import scored_row
    from espalier.trainers.scoring.scoring import Scorer

    scored = [scored_row(run, row, "an answer") for row in rows]
    size = run.batch_size(_BATCH, len(scored))
    scorer = Scorer(run.model, run.params, batch_size=size, sharding=run.row_sharding)
    return [float(logp_T.sum()) for logp_T in scorer(scored)]


def _answered(run: Any, rows: Sequence[Mapping[str, str]]) -> list[Any]:
    """Returns what espalier generate would write for the requests, greedily."""
    from espalier.launch.inference import generate
    from espalier.trainers.decoding.settings import Sampling, Settings

    settings = Settings(max_new_tokens=NEW_TOKENS, sampling=Sampling(temperature=0.0))
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
