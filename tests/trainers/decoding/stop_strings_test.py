"""Text as tokens come: whole characters, and stop strings wherever token boundaries lie."""

import itertools

import pytest

from espalier.trainers.decoding.stop_strings import GrowingText, cut

TEXT = "naïve €5 – 日本, end\nof it"


def decode_bytes(tokens):
    return bytes(tokens).decode("utf-8", "replace")


def decode_dropping(tokens):
    return bytes(tokens).decode("utf-8", "ignore")


def decode_words(tokens):
    """A tokenizer that puts spaces between words, not before the first."""
    return " ".join(["zero", "one", "two", "three"][token] for token in tokens)


def run(decode, tokens, stops=()):
    text = GrowingText(decode, stops)
    pieces = []
    for token in tokens:
        pieces.append(text.add(token))
        if text.stopped:
            break
    return text, [*pieces, text.finish()]


@pytest.mark.parametrize("decode", [decode_bytes, decode_dropping])
def test_pieces_are_whole_characters_and_make_the_text(decode):
    _, pieces = run(decode, TEXT.encode())
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert max(map(len, pieces)) == 1  # none waits longer than it must


def test_what_never_becomes_a_character_comes_at_the_end():
    tokens = b"a\xe2\x82"
    assert "".join(run(decode_bytes, tokens)[1]) == decode_bytes(tokens)


def test_spaces_between_words_are_kept():
    assert "".join(run(decode_words, [3, 0, 2, 2])[1]) == "three zero two two"


@pytest.mark.parametrize("stop", ["€5", "5 –", "本, e", "\n", "end\nof", "日"])
def test_a_row_ends_at_the_token_that_completes_a_stop_string(stop):
    text, pieces = run(decode_bytes, TEXT.encode(), [stop, "never there"])
    assert text.stopped and "".join(pieces) == TEXT[: TEXT.index(stop)]
    # A reference that decodes everything anew: the fewest tokens whose text has the stop string.
    raw = TEXT.encode()
    fewest = next(n for n in itertools.count() if stop in raw[:n].decode("utf-8", "replace"))
    assert text.tokens == list(raw[:fewest])
    assert text.add(65) == "" and text.tokens == list(raw[:fewest])


def test_the_first_of_several_stop_strings_ends_it():
    assert "".join(run(decode_bytes, b"one two three", ["three", "two"])[1]) == "one "
    assert cut("one two", ["two", "ne"]) == "o"
    assert cut("one", ["x"]) is None


def test_beginnings_of_stop_strings_are_held_back_until_they_are_not():
    text = GrowingText(decode_bytes, ["aab"])
    # After "aa" an a or b decides: "aaab" holds the stop string from its second letter.
    assert [text.add(ord(c)) for c in "aaaxaaab"] == ["", "", "a", "aax", "", "", "a", ""]
    assert text.stopped
    unfinished = GrowingText(decode_bytes, ["aab"])
    assert unfinished.add(ord("a")) == "" and unfinished.finish() == "a"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        GrowingText(decode_bytes, [""])
