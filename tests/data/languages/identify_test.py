"""Lines in the language, in another script, and in another language of the same script."""

import random
import re
import time

import pytest

from espalier.data.languages import identify

CZECH = "Příliš žluťoučký kůň úpěl ďábelské ódy."
GERMAN = "Der schnelle braune Fuchs springt über den faulen Hund."
RUSSIAN = "Съешь же ещё этих мягких французских булок."
JAPANESE = "これは日本語の文です。"
CHINESE = "这是一个用中文写的句子。"
PERSIAN = "این جمله به زبان فارسی نوشته شده است."


@pytest.fixture(scope="module")
def lingua():
    pytest.importorskip("lingua")
    return identify.detector("lingua")


def test_letters_are_counted_by_script_and_other_characters_not_at_all():
    counts = identify.script_counts("Aб 12, あア漢한!")
    assert counts == {"Latn": 1, "Cyrl": 1, "Hira": 1, "Kana": 1, "Hani": 1, "Hang": 1}
    assert identify.script_of("12 !?") is None
    assert identify.script_of("ab в") == "Latn"


def test_scripts_tell_only_scripts_apart():
    by = identify.detector("script")
    assert identify.check(f"{CZECH}\n{GERMAN}", "cs", by).passes
    found = identify.check(f"{RUSSIAN}\n{GERMAN}", "ru", by)
    assert (found.lines, found.right, found.others, found.passes) == (2, 1, {"Latn": 1}, False)
    assert identify.check(JAPANESE, "ja", by).passes
    assert identify.check(JAPANESE, "zh", by).others == {"Hira": 1}


def test_what_is_no_prose_is_not_judged():
    text = f"```python\nprint('hello world again')\n```\n12 + 3 = 15\nhttps://example.org/a/long/path\n{RUSSIAN}"
    assert identify.judged_lines(text) == [RUSSIAN]
    assert identify.judged_lines("```\nnever closed, all of it is code") == []
    short = identify.check("Да.", "ru", identify.detector("script"))
    assert (short.lines, short.passes) == (0, None)
    # A few letters are enough to show another script.
    assert identify.check("Yes.", "ru", identify.detector("script")).others == {"Latn": 1}


def test_addresses_and_code_are_the_leftmost_longest_ones():
    """Against the pattern that says so and takes quadratic time."""
    plain = re.compile(r"https?://\S+|\S+@\S+|`[^`\n]*`")
    draw = random.Random(0)
    pieces = ["a", "é", "@", "`", " ", "\n", "\t", "http://", "https://", "漢"]
    for _ in range(20_000):
        text = "".join(draw.choices(pieces, k=draw.randrange(14)))
        if "```" in text:  # begins code of several lines
            continue
        assert identify.judged_lines(text, min_letters=0) == [
            line.strip() for line in plain.sub(" ", text).splitlines()
        ]


@pytest.mark.parametrize(
    "piece", ["漢", "a", "@", "a`", "`a`", "` a`b", "http://", "```\n", "~~~", " \n", "\t"]
)
def test_the_time_for_a_text_without_spaces_is_linear(piece):
    def seconds(length):
        text = piece * (length // len(piece))
        times = []
        for _ in range(4):
            began = time.process_time()
            identify.judged_lines(text)
            times.append(time.process_time() - began)
        return min(times)

    # A quadratic time would be 16 times as long.
    assert seconds(200_000) < 8 * seconds(50_000)


def test_rates_are_of_texts_and_of_lines():
    by = identify.detector("script")
    texts = [RUSSIAN, f"{RUSSIAN}\n{GERMAN}", "Да."]
    rates = identify.pass_rates([identify.check(text, "ru", by) for text in texts])
    assert rates == {
        **{"texts": 3, "judged": 2, "texts_passed": 0.5, "lines": 3, "lines_passed": 2 / 3},
        "others": {"Latn": 1},
    }
    assert identify.pass_rates([])["texts_passed"] is None


def test_lingua_tells_languages_of_one_script_apart(lingua):
    for code, text in {
        **{"cs": CZECH, "de": GERMAN, "ru": RUSSIAN, "ja": JAPANESE, "zh": CHINESE},
        "fa": PERSIAN,
    }.items():
        assert identify.check(text, code, lingua).passes, code
        assert identify.language_of(text) == code
    assert identify.language_of(f"{GERMAN}\n{CZECH}\n{GERMAN}") == "de"
    assert identify.language_of("12 + 30 = 42") is None
    assert identify.check(f"{CZECH}\n{GERMAN}", "cs", lingua).others == {"de": 1}
    assert identify.check(PERSIAN, "ar", lingua).others == {"fa": 1}
    assert lingua.name.startswith("lingua 2.")


def test_an_unknown_detector_is_an_error():
    with pytest.raises(ValueError, match="detector is 'fasttext'"):
        identify.detector("fasttext")
