"""The table of languages agrees with the sources of text, FLORES' codes and old tags."""

import pytest

from espalier.data.languages import table
from espalier.data.text.sources import languages as sources


def test_the_table_has_the_23_languages_of_the_packaged_text():
    assert len(table.LANGUAGES) == 23
    variants = [name for one in table.LANGUAGES.values() for name in one.sources]
    assert sorted(variants) == sorted(f"lang_{name}" for name in sources.VARIANTS)
    assert all(table.of_source(name).code == name.split("_")[1] for name in variants)
    assert table.of_source("english") is None


def test_scripts_and_codes_are_those_of_the_standards():
    assert {code for code, one in table.LANGUAGES.items() if not one.has_spaces} == {"ja", "zh"}
    assert table.LANGUAGES["ja"].scripts == {"Hira", "Kana", "Hani"}
    flores = {code: one.flores for code, one in table.LANGUAGES.items()}
    assert flores["ko"] == ("kor_Hang",) and flores["fa"] == ("pes_Arab",)
    assert flores["zh"] == ("zho_Hans", "zho_Hant") and flores["uk"] == ("ukr_Cyrl",)


@pytest.mark.parametrize(
    ("tag", "code"),
    [
        *(("iw", "he"), ("in", "id"), ("zh-Hant", "zh"), ("zh_CN", "zh"), ("pt_BR", "pt")),
        *(("arb_Arab", "ar"), ("Greek", "el"), (" EN ", "en"), ("fas", "fa")),
    ],
)
def test_other_tags_mean_the_same_languages(tag, code):
    assert table.find(tag).code == code


def test_another_language_is_known_by_the_first_part_of_its_tag():
    codes = {"pt_BR": "pt", "iw": "he", "sw_KE": "sw", " SW ": "sw"}
    assert {tag: table.code_of(tag) for tag in codes} == codes
    by_language = table.ByLanguage({"iw": 1, "sw-KE": 2})
    assert (by_language["he-IL"], by_language.get("SW"), by_language.get("tr")) == (1, 2, None)
    assert list(by_language) == ["iw", "sw-KE"] and len(by_language) == 2
    scripts = table.ByLanguage({"zh-Hans": 1, "zh-Hant": 2})
    assert [scripts[x] for x in ("zh-Hant", "zh-Hans", "zh", "zh-TW")] == [2, 1, 1, 1]


def test_an_unknown_language_is_an_error_with_a_hint():
    with pytest.raises(ValueError, match="unknown language 'grek'; did you mean"):
        table.find("grek")
