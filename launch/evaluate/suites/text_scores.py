"""Scores of generated texts in any script, between 0 and 1: chrF++ and spBLEU of translations, ROUGE-L of summaries."""

import functools
import os
import unicodedata
from collections.abc import Sequence

from espalier.data.languages import identify

_ALONE = frozenset({"Hani", "Hira", "Kana", "Thai"})  # scripts without spaces between words
_WORD = "LMN"  # categories of letters, marks and numbers

Items = Sequence[tuple[str, str]]  # (reference, translation), as lm-evaluation-harness passes them


def chrf_plus_plus(items: Items) -> float:
    """Returns chrF++ of a corpus by sacrebleu: characters up to 6 and words up to 2, beta 2."""
    from sacrebleu.metrics.chrf import CHRF

    references, translations = zip(*items, strict=True)
    return CHRF(word_order=2).corpus_score(list(translations), [list(references)]).score / 100


def spbleu(items: Items) -> float:
    """Returns BLEU of a corpus by sacrebleu, over the SentencePiece tokens of FLORES-200.

    It is NaN if their model is not on this machine (`spbleu_missing`).
    """
    if spbleu_missing():
        return float("nan")
    from sacrebleu.metrics.bleu import BLEU

    references, translations = zip(*items, strict=True)
    metric = BLEU(tokenize="flores200")
    return metric.corpus_score(list(translations), [list(references)]).score / 100


def spbleu_missing() -> str:
    """Returns where sacrebleu needs the SentencePiece model of FLORES-200 and how to get it; empty if it is there."""
    from sacrebleu.tokenizers import tokenizer_spm
    from sacrebleu.utils import SACREBLEU_DIR

    url = tokenizer_spm.SPM_MODELS["flores200"]["url"]
    path = os.path.join(SACREBLEU_DIR, "models", os.path.basename(url))
    if os.path.isfile(path):
        return ""
    return f"{path} does not exist: curl -L {url} -o {path}"


def rouge_l(text: str, reference: str) -> float:
    """Returns the F measure of ROUGE-L by the package rouge_score over `words`; its own tokens are only a-z and 0-9."""
    return float(_scorer().score(reference, text)["rougeL"].fmeasure)


@functools.cache
def _scorer():
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=_Words())


class _Words:
    def tokenize(self, text: str) -> list[str]:
        return words(text)


def words(text: str) -> list[str]:
    """Returns the words of a text in lower case: runs of letters, marks and numbers.

    In scripts without spaces between words, every letter is one.
    """
    out: list[str] = []
    touches = goes_on = (
        False  # whether a letter comes right before, and whether a word may go on after it
    )
    for letter in unicodedata.normalize("NFC", text).lower():
        kind = unicodedata.category(letter)[0]
        if kind not in _WORD:
            touches = goes_on = False
            continue
        if kind == "M" and touches:
            out[-1] += letter
            continue
        alone = identify.script_of(letter) in _ALONE
        if goes_on and not alone:
            out[-1] += letter
        else:
            out.append(letter)
        touches, goes_on = True, not alone
    return out
