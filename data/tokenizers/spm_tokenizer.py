"""Converts SentencePiece models to tokenizers of the library `tokenizers`, for other programs.

BPE: SentencePiece joins the adjacent pieces whose concatenation has the best score. The merges are
therefore all divisions of a piece into two pieces, in descending order of the piece's score. Pieces
contain a space as a space, because U+2581 in a text is a different character
(`data.tokenizers.vocabularies` separates the two). User-defined pieces become added tokens; both
libraries match them first. In both libraries, characters without a piece become bytes.

SentencePiece treats special tokens spelled in a text as text; tokenizer_config.json therefore sets
`split_special_tokens`. Ids differ in two cases. First, SentencePiece encodes several consecutive
U+2581 in a text as a user-defined run of spaces. Second, with a unigram model, two divisions of a
text can be equally probable, such as three newlines as 1 + 2 or 2 + 1; SentencePiece then chooses
by the rounding of its float32 sums. A tokenizer.json of a unigram model is written with a warning.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of pieces
_UNIGRAM, _BPE = 1, 2  # types of models
_MAX_PIECE = 4096  # characters; the time for a piece grows with the square of its length
# Texts that a converted tokenizer must encode exactly like the model, before it is written.
PROBES = (
    "",
    "def f(x):\n    return x + 10.25  # naïve\n\n\t\tEnd",
    " two  three   and  a tab\t and\r\n    lines  ",
    "日本語の文章。 한국어 हिन्दी العربية ไทย Ελληνικά",
    "a\u0301 e\u0301 ﬁ ² \u2581 \u2582 \u00a0 \u200b \ufeff 🙂👩\u200d🚀 \x00\x7f",
    "Dear Sir or Madam, it's 2024; 100,000 people won't. (See [1].)",
)


class ConversionError(ValueError):
    """The library `tokenizers` cannot reproduce the ids of a SentencePiece model."""


def write(model: bytes, folder: pathlib.Path) -> str | None:
    """Writes the tokenizer.json and tokenizer_config.json of the bytes of a SentencePiece model.

    transformers assigns the same ids. Returns a warning about texts whose ids may differ, or None.

    Raises:
      ConversionError: the ids cannot be reproduced; nothing is written.
    """
    tokenizer, config = convert(model)
    _compare(tokenizer, model)
    tokenizer.save(str(folder / "tokenizer.json"))
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", "utf-8")
    if isinstance(tokenizer.model, models.Unigram):
        return (
            "tokenizer.json divides some runs of line ends, tabs and spaces into other pieces than "
            "tokenizer.model, which decides between equally probable ones by rounding"
        )
    return None


def convert(model: bytes) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Returns the tokenizer and the content of tokenizer_config.json.

    Raises:
      ConversionError: the model is neither BPE nor unigram.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    kind = proto.trainer_spec.model_type
    pieces = [piece.piece.replace(SPACE, " ") for piece in proto.pieces]
    scores = [piece.score for piece in proto.pieces]
    types = [piece.type for piece in proto.pieces]
    if kind == _BPE:
        inner: models.Model = bpe(pieces, scores, types)
    elif kind == _UNIGRAM:
        inner = _unigram(pieces, scores, types)
    else:
        raise ConversionError(f"a SentencePiece model of type {kind} is neither BPE nor unigram")
    tokenizer = tokenizers.Tokenizer(inner)
    if steps := _normalizers(proto.normalizer_spec):
        tokenizer.normalizer = normalizers.Sequence(steps)
    decoding: list[decoders.Decoder] = [decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decoding)
    matched = types if kind == _BPE else [CONTROL if t == CONTROL else NORMAL for t in types]
    add_tokens(tokenizer, pieces, matched)
    names = {"pad": "pad_id", "eos": "eos_id", "unk": "unk_id", "bos": "bos_id"}
    ids = {name: getattr(proto.trainer_spec, field) for name, field in names.items()}
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": pieces[id] for name, id in ids.items() if 0 <= id < len(pieces)},
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }


def bpe(pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> models.BPE:
    """Returns the BPE model of SentencePiece pieces, with merges as in the module's docstring."""
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    mergeable = (NORMAL, UNUSED)  # unused pieces take part in merging and are divided afterwards
    if (longest := max(map(len, pieces), default=0)) > _MAX_PIECE:
        raise ConversionError(
            f"a piece has {longest:,} characters; at most {_MAX_PIECE:,} are supported"
        )
    merges = []
    for id, (piece, type) in enumerate(zip(pieces, types, strict=True)):
        if type not in mergeable:
            continue
        for cut in range(1, len(piece)):
            left, right = vocabulary.get(piece[:cut]), vocabulary.get(piece[cut:])
            if left is None or right is None:
                continue
            if types[left] in mergeable and types[right] in mergeable:
                merges.append((-scores[id], id, left, right))
    merges.sort()
    unknown = [piece for piece, type in zip(pieces, types, strict=True) if type == UNKNOWN]
    return models.BPE(
        vocabulary,
        [(pieces[left], pieces[right]) for _, _, left, right in merges],
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=BYTE in types,
    )


def _unigram(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> models.Unigram:
    """Returns the unigram model of SentencePiece pieces.

    SentencePiece searches only for normal and user-defined pieces. It scores user-defined pieces by
    their length in bytes, where a space counts three (measured with version 0.2.3, by the scores at
    which its choice changes). `tokenizers` searches for all pieces, so the other pieces get scores
    too low to be chosen. Characters without a piece have no alternative, whatever their score.
    """

    def score(id: int) -> float:
        if types[id] == USER_DEFINED:
            return 0.1 * len(pieces[id].replace(" ", SPACE).encode()) - 0.1
        return scores[id] if types[id] == NORMAL else -1e6

    return models.Unigram(
        [(piece, score(id)) for id, piece in enumerate(pieces)],
        unk_id=types.index(UNKNOWN),
        byte_fallback=BYTE in types,
    )


def add_tokens(
    tokenizer: tokenizers.Tokenizer, pieces: Sequence[str], types: Sequence[int]
) -> None:
    """Adds control and unknown pieces as special tokens, and user-defined pieces as added tokens."""
    tokenizer.add_special_tokens(
        [
            AddedToken(piece, special=True, normalized=False)
            for piece, type in zip(pieces, types, strict=True)
            if type in (CONTROL, UNKNOWN)
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(piece, special=False, normalized=False)
            for piece, type in zip(pieces, types, strict=True)
            if type == USER_DEFINED
        ]
    )


def _normalizers(spec: Any) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    return steps


def _compare(tokenizer: tokenizers.Tokenizer, model: bytes) -> None:
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in PROBES:
        expected = reference.encode(text)
        if (ids := tokenizer.encode(text, add_special_tokens=False).ids) != expected:
            raise ConversionError(
                f"a tokenizer.json of the SentencePiece model would encode {text!r} as {ids}, not as "
                f"{expected}: programs that need a tokenizer.json cannot use this vocabulary"
            )
