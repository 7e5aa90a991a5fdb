"""Control tokens: those that a chat template writes, and that the contents of messages must not.

A template writes tokens such as `<|im_end|>` as text, so a content that spells one would end its own turn. Where a template
puts a content is known only to itself. So it is rendered once more with a mark in every place of a content where the
spelling of a control token may begin; a spelling in the conversation without a mark is the template's. The spellings of
the contents are encoded as the text that they are, in one pass with all other text: for this pass the control tokens have
other names in the vocabulary, which no text has, and so have the places where the template writes them. The pass is also
made if the usual one has more control tokens than the template wrote: a tokenizer may normalise a text to a spelling.
"""

import functools
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from espalier.common.checkpoint_files import CheckpointFileError
from espalier.data.tokenizers.chat_sandbox import Rendered, Written

_MARKS = range(0xE000, 0xF900)  # private use
_NAMES = 0xF0000  # private use; names of up to 65,534 tokens
_ROLES = ("system", "user", "assistant", "tool")
_SPACE = "\u2581"  # a space in SentencePiece's pieces


@functools.lru_cache(maxsize=16)
def names(tokens: frozenset[str]) -> Mapping[str, str]:
    """Returns a name of the same length for each token."""
    return {token: chr(_NAMES + i) * len(token) for i, token in enumerate(sorted(tokens))}


def named(written: Written, text: str) -> str:
    """Returns the text with the names of `names` in the places of its control tokens.

    Raises:
      CheckpointFileError: the text has characters of the names.
    """
    given = names(written.tokens)
    if not frozenset("".join(given.values())).isdisjoint(text):
        raise CheckpointFileError(
            f"a text that spells control tokens has private-use characters from U+{_NAMES:X} on"
        )
    parts, end = [], 0
    for place in written.places:
        parts += [text[end : place[0]], given[text[slice(*place)]]]
        end = place[1]
    return "".join([*parts, text[end:]])


def of(vocabulary: Any) -> Mapping[str, bool]:
    """Returns the tokens of a vocabulary that texts may spell, and whether each is a control token whatever the template.

    The others, such as `<think>`, are if the template writes them. Bytes and characters have none.
    """
    if hasattr(vocabulary, "added_tokens"):
        added = vocabulary.added_tokens
        return {
            token: special
            for token, special in added.items()
            if token.strip() and (special or len(token) > 1)
        }
    return dict.fromkeys(_user_defined(getattr(vocabulary, "sp_model", None)), True)


def encode(vocabulary: Any, rendered: Rendered) -> tuple[list[int], list[bool]]:
    """Returns the ids of a rendered conversation, and for each whether it overlaps one of the spans.

    Raises:
      CheckpointFileError: see `named`.
    """
    if hasattr(vocabulary, "encode_marked"):
        return vocabulary.encode_marked(rendered)
    text, written = rendered.text, rendered.written

    def divided(encoded: Callable[[str], Sequence[int]]) -> tuple[list[int], list[bool]]:
        # This vocabulary does not know which characters a token covers, so the text is divided before.
        ids: list[int] = []
        marked: list[bool] = []
        place = 0
        for start, end in (*(rendered.spans or ()), (len(text),) * 2):
            for part, mark in ((text[place:start], False), (text[start:end], True)):
                new = encoded(part)
                ids += new
                marked += [mark] * len(new)
            place = end
        return ids, marked

    model = getattr(vocabulary, "sp_model", None)
    if written is None or model is None:
        return divided(vocabulary.encode)
    if not written.spelled:
        usual = divided(vocabulary.encode)
        if is_as_written(written, usual[0], _user_defined(model)):
            return usual
    text = named(written, text)
    return divided(_renamed(model, written.tokens).encode)


def is_as_written(written: Written, ids: Sequence[int], by_spelling: Mapping[str, int]) -> bool:
    """Returns whether ids have no more control tokens than their template wrote; `by_spelling`: the ids of these tokens."""
    control = {by_spelling[token] for token in written.tokens}
    return sum(id in control for id in ids) <= len(written.places)


def as_text(text: str, added: Mapping[str, bool]) -> Rendered:
    """Returns a text in which nothing is a control token."""
    tokens = frozenset(token for token, always in added.items() if always)
    return Rendered(text, (), Written(tokens, (), spelled=any(token in text for token in tokens)))


def written(
    text: str,
    values: Mapping[str, Any],
    render: Callable[[Mapping[str, Any]], str],
    *,
    source: str,
    added: Mapping[str, bool],
) -> Written | None:
    """Returns which control tokens of a conversation its template has written; None without tokens that texts may spell.

    Args:
      text: the rendered conversation.
      values: the contents that the template renders.
      render: renders other contents by the same template.
      source: the template.
      added: see `of`.

    Raises:
      ValueError: contents spell control tokens, and the template changes them so that their places are unknown.
    """
    tokens = frozenset(
        token
        for token, always in added.items()
        if always or token in source or any(role in token for role in _ROLES)
    )
    if not tokens:
        return None
    spelling, leaves = _alternatives(tokens), list(_leaves(values))
    usual = Written(tokens, tuple(match.span() for match in spelling.finditer(text)), False)
    firsts = {token[0] for token in tokens}
    if firsts.isdisjoint(character for leaf in leaves for character in leaf):
        return usual
    mark = _unused("".join([text, *leaves]))

    def marked(exempt: Collection[str]) -> str | None:
        """Returns the conversation with marks; None if the template renders it otherwise. `exempt` have no marks."""
        pattern = _alternatives(exempt, "|[" + re.escape("".join(sorted(firsts))) + "]")
        add = lambda match: match[0] if match[0] in exempt else match[0] + mark  # noqa: E731
        try:
            shown = render(_mapped(values, lambda leaf: pattern.sub(add, leaf)))
        except ValueError:
            return None
        return shown if shown.replace(mark, "") == text else None

    spelled = {token for token in tokens if any(token in leaf for leaf in leaves)}
    if (shown := marked(())) is None:
        # Templates look for marks such as </think> in contents; what they leave of these is theirs.
        loose = {token for token in spelled if not added[token]}
        shown = marked({token for token in loose if marked(loose - {token}) is None})
    if shown is None:
        if not spelled:
            return usual
        raise ValueError(
            f"a message spells the control token {min(spelled)!r}, and the template changes messages, so that it cannot be "
            "told from the template's own. Remove it from the message"
        )
    begun = {match.start() - 1 - i for i, match in enumerate(re.finditer(mark, shown))}
    places, start, is_spelled = [], 0, False
    while (match := spelling.search(text, start)) is not None:
        if begun.isdisjoint(range(*match.span())):
            places.append(match.span())
            start = match.end()
        else:
            is_spelled, start = True, match.start() + 1
    return Written(tokens, tuple(places), is_spelled)


@functools.lru_cache(maxsize=4)
def renamed_tokenizer(content: bytes, tokens: frozenset[str]) -> bytes:
    """Returns a tokenizer.json in which the tokens have the names of `names`, and the same ids."""
    given = names(tokens)
    tokenizer = json.loads(content)
    for token in tokenizer["added_tokens"]:
        if token["content"] in given:
            token |= {
                "content": given[token["content"]],
                "normalized": False,
                "single_word": False,
            }
    model = tokenizer["model"]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {given.get(piece, piece): id for piece, id in model["vocab"].items()}
    else:
        model["vocab"] = [[given.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in given:
        model["unk_token"] = given[model["unk_token"]]
    if "merges" in model:  # pairs, or texts of two pieces with a space
        joined = lambda pair: pair.replace(" ", "", 1) if isinstance(pair, str) else "".join(pair)  # noqa: E731
        model["merges"] = [pair for pair in model["merges"] if joined(pair) not in given]
    return json.dumps(tokenizer).encode()


@functools.lru_cache(maxsize=4)
def _renamed(model: bytes, tokens: frozenset[str]) -> Any:
    """Returns the processor of a SentencePiece model in which the tokens have the names of `names`, and the same ids."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    given = names(tokens)
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for piece in proto.pieces:
        if (core := piece.piece.strip(_SPACE)) in given:
            piece.piece = piece.piece.replace(core, given[core])
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


@functools.lru_cache(maxsize=4)
def _user_defined(model: bytes | None) -> Mapping[str, int]:
    """Returns the ids of pieces that SentencePiece finds before all others; not of runs of white space and characters."""
    if model is None:
        return {}
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
    pieces = ((id, piece.piece.strip(_SPACE), piece.type) for id, piece in enumerate(proto.pieces))
    return {
        core: id for id, core, type in pieces if type == kind and core.strip() and len(core) > 1
    }


def _alternatives(tokens: Collection[str], rest: str = "") -> re.Pattern[str]:
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile(("|".join(map(re.escape, longest_first)) + rest).removeprefix("|"))


def _unused(text: str) -> str:
    """Returns a character for marks that the text does not have."""
    present = set(text)
    for code in _MARKS:
        if chr(code) not in present:
            return chr(code)
    raise ValueError("the messages have all private-use characters of Unicode's first plane")


def _leaves(value: Any) -> Iterator[str]:
    """Yields all texts in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Returns a JSON value with other texts."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, change) for item in value]
    return value
