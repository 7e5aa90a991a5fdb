"""Compares vocabularies over languages: how many tokens the same sentences take, and what scripts the pieces are of."""

import collections
import dataclasses
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from espalier.data.languages import identify, table
from espalier.data.languages.parallel import Pairs

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BROKEN = "\N{REPLACEMENT CHARACTER}"
# What a piece is of that has no letters.
PART, OTHER = "parts of characters", "digits and signs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What a vocabulary makes of the texts of a language.

    Attributes:
      texts: their number.
      tokens: their number.
      fertility: tokens per word; per letter in languages without spaces between words.
      bytes_per_token: UTF-8 bytes per token.
      parity: tokens over the tokens of the same texts in English.
      byte_fallback: share of tokens that are only a part of a character.
      unknown: share of tokens that stand for characters the vocabulary lacks.
    """

    texts: int
    tokens: int
    fertility: float
    bytes_per_token: float
    parity: float
    byte_fallback: float
    unknown: float


def measure(vocabulary: Any, pairs: Pairs) -> dict[str, Any]:
    """Returns the report of a vocabulary.

    Args:
      vocabulary: a SeqIO vocabulary, such as from `data.tokenizers.vocabularies`.
      pairs: language -> (English, the same in the language).

    Returns:
      'size'; 'languages': code -> the fields of Rates; 'families' and 'scripts': name -> mean parity of its languages;
      'worst': the language of the highest parity; 'parity_spread' and 'bytes_per_token_spread', the highest over the
      lowest of the languages; and 'pieces': script -> share of the vocabulary's pieces.
    """
    broken = _parts_of_characters(vocabulary)
    rates = {code: _rates(vocabulary, code, texts, broken) for code, texts in pairs.items()}
    parity = {code: one.parity for code, one in rates.items()}
    sizes = [one.bytes_per_token for one in rates.values()]
    return {
        "size": vocabulary.vocab_size,
        "languages": {code: dataclasses.asdict(one) for code, one in rates.items()},
        "families": _grouped(parity, lambda code: table.LANGUAGES[code].family),
        "scripts": _grouped(parity, lambda code: table.LANGUAGES[code].writing[0]),
        "worst": max(parity, key=lambda code: parity[code]),
        "parity_spread": max(parity.values()) / min(parity.values()),
        "bytes_per_token_spread": max(sizes) / min(sizes),
        "pieces": pieces_by_script(vocabulary, broken),
    }


def _rates(
    vocabulary: Any, code: str, texts: Sequence[tuple[str, str]], broken: frozenset[int]
) -> Rates:
    language = table.LANGUAGES[code]
    ids = [id for _, text in texts for id in vocabulary.encode(text)]
    english = sum(len(vocabulary.encode(text)) for text, _ in texts)
    units = sum(_units(text, language.has_spaces) for _, text in texts)
    size = sum(len(text.encode("utf-8")) for _, text in texts)
    unknown = getattr(vocabulary, "unk_id", None)
    return Rates(
        texts=len(texts),
        tokens=len(ids),
        fertility=len(ids) / units,
        bytes_per_token=size / len(ids),
        parity=len(ids) / english,
        byte_fallback=sum(id in broken for id in ids) / len(ids),
        unknown=0.0 if unknown is None else ids.count(unknown) / len(ids),
    )


def _units(text: str, has_spaces: bool) -> int:
    return len(text.split()) if has_spaces else sum(not letter.isspace() for letter in text)


def pieces_by_script(vocabulary: Any, broken: frozenset[int] | None = None) -> dict[str, float]:
    """Returns the share of the vocabulary's pieces by the script of most of their letters, the largest first.

    Special tokens and sentinels do not count. Pieces without letters are OTHER; those that are less than a character are PART.
    """
    broken = _parts_of_characters(vocabulary) if broken is None else broken
    counts: collections.Counter[str] = collections.Counter({PART: len(broken)})
    for id, text in _texts(vocabulary).items():
        if id not in broken:
            counts[identify.script_of(text) or OTHER] += 1
    total = counts.total()
    return {name: count / total for name, count in counts.most_common() if count}


def _parts_of_characters(vocabulary: Any) -> frozenset[int]:
    """Returns the ids of tokens that are bytes, or end within a character."""
    return frozenset(
        id for id, text in _texts(vocabulary).items() if _BROKEN in text or _BYTE.fullmatch(text)
    )


def _texts(vocabulary: Any) -> dict[int, str]:
    """Returns the text of each piece; <0x..> for a byte."""
    if hasattr(vocabulary, "spellings"):  # of Hugging Face
        return {
            id: spelling if _BYTE.fullmatch(spelling) else vocabulary.decode([id])
            for id, spelling in vocabulary.spellings.items()
        }
    if (model := getattr(vocabulary, "tokenizer", None)) is not None:  # SeqIO's SentencePiece
        return {
            id: model.IdToPiece(id).replace("\u2581", " ")
            for id in range(vocabulary.vocab_size - vocabulary.extra_ids)
            if not (model.IsControl(id) or model.IsUnknown(id) or model.IsUnused(id))
        }
    if (symbols := getattr(vocabulary, "symbols", None)) is not None:  # of characters
        return {vocabulary.encode(symbol)[0]: symbol for symbol in symbols}
    # Of bytes: those of ASCII are characters.
    first = vocabulary.encode("a")[0] - ord("a")
    return {first + byte: chr(byte) if byte < 0x80 else f"<0x{byte:02X}>" for byte in range(256)}


def _grouped(values: Mapping[str, float], group: Callable[[str], str]) -> dict[str, float]:
    members = collections.defaultdict(list)
    for code, value in values.items():
        members[group(code)].append(value)
    return {name: statistics.fmean(some) for name, some in sorted(members.items())}
