"""The list of words finds them in what a reader sees, and names file, line and replacement."""

import pytest

from tests import words


@pytest.fixture
def faults(tmp_path, monkeypatch):
    """The faults of a file with a text."""
    monkeypatch.setattr(words, "ROOT", tmp_path)

    def of(name, text):
        (tmp_path / name).write_text(text)
        return list(words.faults(tmp_path / name))

    return of


def test_a_page_is_checked_outside_its_code(faults):
    text = "Begins anew.\n\n```\nanew\n```\n`anew` [x](anew.md)\n## And so on\n"
    assert faults("page.md", text) == [
        "page.md:1: 'anew': write again",
        "page.md:7: '## And': write a title that says its subject",
    ]


def test_the_words_of_claims_are_fixed(faults):
    assert faults("page.md", "<!-- A1 -->\nDrawn anew\n\nby 2\n\n<!-- why -->\nGood\n") == []


def test_docstrings_and_help_texts_are_checked(faults):
    text = '"""Module."""\n\ndef f():\n    """Returns it,\n\n    in place of\n    that."""\n\nadd(help="goes on" " where")\nx = "anew"\n'
    assert faults("a.py", text) == [
        "a.py:6: 'in place of': write 'instead of'",
        "a.py:9: 'goes on where': write 'continues'",
    ]
