"""StarCoder's filters of source files, each with what it drops and what it just keeps."""

import pytest

from espalier.data.code_mix import starcoder_filters
from espalier.data.text import document_filters


def keeps(name, text, *, lang="Python", **settings):
    return getattr(starcoder_filters, name)(**settings)({"text": text, "lang": lang})


@pytest.mark.parametrize(
    ("name", "lang", "kept", "dropped"),
    [
        # Two short lines bring the mean of a long one down.
        ("LineLengths", "Python", "x" * 1000 + "\n" * 20, "x" * 1001 + "\n" * 20),
        ("LineLengths", "Python", "x" * 100 + "\n" + "y" * 100, "x" * 100 + "\n" + "y" * 101),
        ("Letters", "C", "a" + "1" * 3, "a" + "1" * 4),
        ("XmlHeader", "C", "x" * 87 + "<?xml version=", "x" * 86 + "<?xml version="),
        ("VisibleText", "HTML", f"<p>{'a' * 100}</p>", f"<p>{'a' * 99}</p>"),
        ("VisibleText", "HTML", f"<{'b' * 398}>{'a' * 100}", f"<{'b' * 399}>{'a' * 100}"),
        ("FileSize", "JSON", "1" * 50, "1" * 49),
        ("FileSize", "YAML", "1" * 5000, "1" * 5001),
    ],
)
def test_each_has_its_bound(name, lang, kept, dropped):
    assert keeps(name, kept, lang=lang)
    assert not keeps(name, dropped, lang=lang)


def test_scripts_styles_comments_and_tags_are_not_seen():
    hidden = "<script>" + "a" * 500 + "</script><style>b {}</style><!-- " + "c" * 500 + " -->"
    page = hidden + "<p title='" + "d" * 50 + "'>" + "see &amp; " * 20 + "</p>"
    assert keeps("VisibleText", page, lang="HTML", share=0.0, characters=100)
    assert not keeps("VisibleText", page, lang="HTML", share=0.0, characters=201)


def test_files_of_other_languages_are_kept_and_lang_is_read_only_where_it_matters():
    assert keeps("FileSize", "1", lang="Python") and keeps("VisibleText", "", lang="C")
    filters = [starcoder_filters.Letters(), starcoder_filters.FileSize()]
    assert document_filters.Sieve(filters).keys == ("lang",)
    assert starcoder_filters.Letters().keys == ()
    assert starcoder_filters.Letters()({"text": "no lang"})
    assert not keeps("Letters", "123", lang="R", languages=["R"])
    assert keeps("Letters", "123", lang="C", languages=["R"])
