"""The report on vocabularies, against closed forms; aligned texts of each kind, and what is wrong with them."""

import json

import pytest

from espalier.data.languages import parallel, tokenizer_report
from espalier.data.text.documents import DataError
from espalier.data.tokenizers import vocabularies

PAIRS = {
    "en": [("a cat", "a cat"), ("dogs", "dogs")],
    "ru": [("a cat", "кот"), ("dogs", "псы")],
    "ja": [("a cat", "ねこ")],
}


def test_bytes_have_the_rates_that_utf_8_gives():
    report = tokenizer_report.measure(vocabularies.byte(), PAIRS)
    english, russian, japanese = (report["languages"][code] for code in ("en", "ru", "ja"))
    assert english == {
        **{"texts": 2, "tokens": 9, "fertility": 3.0, "bytes_per_token": 1.0, "parity": 1.0},
        **{"byte_fallback": 0.0, "unknown": 0.0},
    }
    assert (russian["fertility"], russian["parity"]) == (6.0, 12 / 9)
    assert russian["byte_fallback"] == 1.0
    assert (japanese["fertility"], japanese["parity"]) == (3.0, 6 / 5)  # three bytes a letter
    assert report["worst"] == "ru" and report["parity_spread"] == 12 / 9
    assert report["scripts"] == {"Cyrl": 12 / 9, "Jpan": 6 / 5, "Latn": 1.0}
    assert report["pieces"]["Latn"] == 52 / 256
    assert report["pieces"][tokenizer_report.PART] == 0.5
    assert sum(report["pieces"].values()) == pytest.approx(1)


def test_characters_are_whole_and_others_unknown():
    report = tokenizer_report.measure(vocabularies.characters(symbols="acdgost к"), PAIRS)
    assert report["languages"]["en"]["byte_fallback"] == 0.0
    assert report["languages"]["ru"]["unknown"] == 5 / 6
    assert report["pieces"] == {"Latn": 7 / 9, "Cyrl": 1 / 9, tokenizer_report.OTHER: 1 / 9}


class Texts:
    digest, sources = "texts of two scripts", ("a",)

    def size(self, source):
        return 10_000

    def sample(self, source, num_bytes):
        from espalier.data.text.documents import Document

        return iter([Document("a", "кошка и кошка, a cat and a cat <|TURN|> 12\n" * 50)])


def test_pieces_of_a_trained_vocabulary_are_by_script_and_its_special_tokens_are_whole(tmp_path):
    made = {"corpus": Texts(), "size": 400, "cache_dir": tmp_path}
    plain = vocabularies.sentencepiece(**made)
    special = vocabularies.sentencepiece(**made, special_tokens=("<|TURN|>",))
    assert len(special.encode("<|TURN|>")) == 1 and len(plain.encode("<|TURN|>")) > 1
    assert special.decode(special.encode("a <|TURN|> кошка")) == "a <|TURN|> кошка"
    pieces = tokenizer_report.pieces_by_script(plain)
    assert pieces[tokenizer_report.PART] > 0.5  # the 256 bytes
    assert pieces["Latn"] > 0 and pieces["Cyrl"] > 0 and "Hani" not in pieces
    rates = tokenizer_report.measure(plain, {"en": [("a cat", "a cat")], "ja": [("cat", "ねこ")]})
    assert rates["languages"]["ja"]["byte_fallback"] == 1.0
    assert rates["languages"]["ja"]["tokens"] == 6


def test_flores_is_read_from_its_folder_and_checked(tmp_path):
    folder = tmp_path / "devtest"
    folder.mkdir()
    (folder / "eng_Latn.devtest").write_text("One.\nTwo.\n")
    (folder / "ces_Latn.devtest").write_text("Jedna.\nDvě.\n")
    assert parallel.read(str(tmp_path), ["cs"]) == {"cs": [("One.", "Jedna."), ("Two.", "Dvě.")]}
    assert parallel.read(str(tmp_path), ["en"], limit=1) == {"en": [("One.", "One.")]}
    with pytest.raises(FileNotFoundError, match="deu_Latn.devtest does not exist"):
        parallel.read(str(tmp_path), ["de"])
    (folder / "deu_Latn.devtest").write_text("Eins.\n")
    with pytest.raises(DataError, match="has 1 lines, but English has 2"):
        parallel.read(str(tmp_path), ["de"])
    with pytest.raises(FileNotFoundError, match="neither a folder devtest nor dev"):
        parallel.read(str(folder), ["cs"])


def test_rows_are_read_and_checked(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"language": "iw", "english": "One.", "text": "אחת."}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = parallel.read(str(path), ["he", "en"])
    assert found == {"he": [("One.", "אחת.")], "en": [("One.", "One.")]}
    with pytest.raises(DataError, match="no row in cs"):
        parallel.read(str(path), ["he", "cs"])
    path.write_text('{"language": "xx", "english": "a", "text": "b"}\n')
    with pytest.raises(DataError, match="line 1: unknown language 'xx'"):
        parallel.read(str(path), ["he"])
    path.write_text('{"language": "he", "text": "b"}\n')
    with pytest.raises(DataError, match="line 1: a row needs texts"):
        parallel.read(str(path), ["he"])


def test_packaged_messages_are_aligned():
    pairs = parallel.read(parallel.PACKAGES, ["cs", "zh", "en"], limit=50)
    assert {code: len(texts) for code, texts in pairs.items()} == {"cs": 50, "zh": 50, "en": 50}
    assert all(english == text for english, text in pairs["en"])
    assert all(english != text for english, text in pairs["cs"])
