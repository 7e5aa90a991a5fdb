"""Trained vocabularies: lossless, white space kept, reproducible, found again."""

import dataclasses
import json
import pathlib
import random
import re

import pytest
import sentencepiece

from espalier.data.text import document_files, documents
from espalier.data.text.documents import Document
from espalier.data.text.sources import environment
from espalier.data.tokenizers import vocabularies
from espalier.data.tokenizers.pieces import Pieces


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts in memory, as a corpus shows them."""

    texts: dict[str, tuple[str, ...]]
    digest: str = "0"

    @property
    def sources(self):
        return tuple(self.texts)

    def size(self, source):
        return sum(len(text.encode()) for text in self.texts[source])

    def sample(self, source, num_bytes):
        texts = (Document(str(i), text) for i, text in enumerate(self.texts[source]))
        return documents.take(texts, num_bytes)


def _stdlib(*names):
    root = environment.Environment.current().stdlib
    return tuple((root / name).read_text(encoding="utf-8") for name in names)


CODE = _stdlib("ast.py", "argparse.py", "dataclasses.py", "inspect.py", "json/decoder.py")
PROSE = (
    "Ein schöner Tag. Ein schöner Satz.\n",
    "すべての人間は、生まれながらにして自由である。\n",
) * 50
SETTINGS = {
    "size": 1000,
    "algorithm": "bpe",
    "sample_bytes": 1_000_000,
    "balance": 0.7,
    "character_coverage": 0.9995,
}


def train(**settings):
    """Returns the path of the model of a vocabulary that is trained, or read from the cache."""
    return pathlib.Path(vocabularies.sentencepiece(**settings).sentencepiece_model_file)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def model_path(cache):
    return train(corpus=Texts({"code": CODE, "prose": PROSE}), cache_dir=cache, **SETTINGS)


@pytest.fixture(scope="module")
def model(model_path):
    return sentencepiece.SentencePieceProcessor(model_file=str(model_path))


def test_special_ids_and_size(model):
    assert [model.id_to_piece(i) for i in range(4)] == ["<pad>", "</s>", "<unk>", "<s>"]
    assert model.get_piece_size() == 1000


def test_code_comes_back_exactly(model):
    for text in _stdlib("textwrap.py", "typing.py", "csv.py", "this.py"):
        assert model.decode(model.encode(text)) == text


def test_any_text_comes_back_exactly(model):
    rng = random.Random(0)
    alphabet = [" ", "  ", "\n", "\t", "\r\n", "a", "x", "0", "9", "<", ">", "/", "s", "pad", "unk"]
    alphabet += [
        "é",
        "e\u0301",
        "ß",
        "日本",
        "한",
        "🙂",
        "\u00a0",
        "\u200b",
        "ﬁ",
        "\ufeff",
        "\x00",
        "\x7f",
    ]
    for _ in range(3000):
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 12)))
        ids = model.encode(text)
        assert model.decode(ids) == text, repr(text)
        assert not set(ids) & {0, 1, 2, 3}, repr(text)


def test_the_mark_of_a_space_is_the_one_exception(model):
    assert model.decode(model.encode("a\u2581b")) == "a\u2582b"


@pytest.mark.parametrize("count", [2, 3, 4, 8, 12, 16])
def test_an_indentation_is_one_token(model, count):
    pieces = [model.id_to_piece(i) for i in model.encode("\n" + " " * count + "return")]
    assert pieces[:2] == ["\n", "\u2581" * count]
    assert model.id_to_piece(model.encode("\n\n")) == ["\n\n"]
    assert model.id_to_piece(model.encode("\t\t")) == ["\t\t"]


def test_every_digit_is_a_token(model):
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    digits = [p for p in pieces if any(c.isdigit() for c in p) and not p.startswith("<0x")]
    assert set(digits) >= set("0123456789") and all(len(p.strip("\u2581")) == 1 for p in digits)


def test_characters_that_were_not_seen_become_bytes(model):
    pieces = [model.id_to_piece(i) for i in model.encode("\u0e01")]
    assert pieces == ["<0xE0>", "<0xB8>", "<0x81>"]


def test_it_compresses_what_it_was_trained_on(model):
    text = _stdlib("textwrap.py")[0]
    assert len(text.encode()) / len(model.encode(text)) > 2


def test_training_is_reproducible_and_kept(model_path, cache, tmp_path):
    corpus = Texts({"code": CODE, "prose": PROSE})
    again = train(corpus=corpus, cache_dir=tmp_path, **SETTINGS)
    assert again.read_bytes() == model_path.read_bytes()
    assert again.parent.name == model_path.parent.name
    stamp = model_path.stat().st_mtime_ns
    found = train(corpus=corpus, cache_dir=cache, **SETTINGS)
    assert found == model_path and found.stat().st_mtime_ns == stamp
    record = json.loads((model_path.parent / "vocabulary.json").read_text())
    assert record["corpus"] == "0" and record["size"] == 1000
    assert str(tmp_path).encode() not in again.read_bytes()


def test_a_directory_without_its_model_is_replaced(tmp_path):
    corpus = Texts({"code": CODE})
    path = train(corpus=corpus, cache_dir=tmp_path, **SETTINGS)
    model = path.read_bytes()
    path.unlink()
    again = train(corpus=corpus, cache_dir=tmp_path, **SETTINGS)
    assert again == path and path.read_bytes() == model
    assert [entry.name for entry in path.parent.parent.iterdir()] == [path.parent.name]


def test_corpus_and_settings_choose_the_vocabulary(model_path, cache):
    corpus = Texts({"code": CODE, "prose": PROSE})
    other = train(corpus=dataclasses.replace(corpus, digest="1"), cache_dir=cache, **SETTINGS)
    assert other != model_path
    smaller = train(corpus=corpus, cache_dir=cache, **{**SETTINGS, "size": 900})
    assert smaller not in (other, model_path)


def test_sample_is_shared_among_sources_by_balance():
    corpus = Texts({"big": ("x" * 99 + "\n",) * 1000, "small": ("y" * 99 + "\n",) * 10})

    def sampled(sample_bytes, balance):
        lines = list(vocabularies._lines(corpus, sample_bytes, balance))
        return {letter: sum(letter in line for line in lines) for letter in "xy"}

    assert sampled(10_000, 1.0) == {"x": 100, "y": 1}
    assert sampled(10_000, 0.5) == {"x": 91, "y": 10}
    assert sampled(10_000_000, 0.5) == {"x": 1000, "y": 10}


def test_sample_of_a_source_whose_size_is_not_known():
    class Unknown(Texts):
        def size(self, source):
            return None if source == "y" else super().size(source)

    for texts, share in (({"y": 100}, {"y": 10}), ({"x": 100, "y": 100}, {"x": 10, "y": 10})):
        corpus = Unknown({letter: (letter * 99 + "\n",) * n for letter, n in texts.items()})
        lines = list(vocabularies._lines(corpus, 1000, 0.7))
        assert {letter: sum(letter in line for line in lines) for letter in share} == share


def test_sample_of_files_has_text_of_every_file(tmp_path):
    for name in "abc":
        lines = (json.dumps({"text": name * 50}) + "\n" for _ in range(100))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    corpus = document_files.find(
        name="files",
        files=f"{tmp_path}/*.jsonl",
        validation_fraction=0,
        cache_dir=tmp_path / "cache",
    )
    sampled = "".join(vocabularies._lines(corpus, 1500, 0.7))
    assert {name: sampled.count(name) for name in "abc"} == {"a": 500, "b": 500, "c": 500}


def test_sets_of_files_share_a_sample_as_other_sources_do(tmp_path):
    for name, count in (("a", 1000), ("b", 10)):
        lines = (json.dumps({"text": name * 99}) + "\n" for _ in range(count))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))

    def find(**files):
        return document_files.find(
            name="files", files=files, validation_fraction=0, cache_dir=tmp_path / "cache"
        )

    corpus = find(a=f"{tmp_path}/a.jsonl", b=f"{tmp_path}/b.jsonl")
    sampled = "".join(vocabularies._lines(corpus, 9_900, 0.5))
    assert {name: round(sampled.count(name) / 99) for name in "ab"} == {"a": 91, "b": 10}
    assert corpus.digest == find(b=f"{tmp_path}/b.jsonl", a=f"{tmp_path}/a.jsonl").digest
    assert corpus.digest != find(a=f"{tmp_path}/b.jsonl", b=f"{tmp_path}/a.jsonl").digest


def test_long_lines_are_cut_and_not_lost():
    lines = vocabularies._lines(Texts({"a": ("ab" * 5000,)}), 10**6, 1.0)
    assert "".join(lines) == "ab" * 5000


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
@pytest.mark.parametrize("size", [100, 20_000])
def test_a_size_that_does_not_fit_is_told_with_one_that_does(cache, algorithm, size):
    corpus = Texts({"prose": PROSE}, "prose")
    settings = {**SETTINGS, "algorithm": algorithm}
    with pytest.raises(ValueError, match=rf"of {size:,} pieces \(VOCAB_SIZE\)") as error:
        train(corpus=corpus, cache_dir=cache, **{**settings, "size": size})
    message = str(error.value)
    assert "INTERNAL" not in message and "sample_bytes" not in message  # all of it is read
    fits = int(re.search(r"Set VOCAB_SIZE=(\d+)", message)[1])
    assert (fits > size) == (size == 100)
    train(corpus=corpus, cache_dir=cache, **{**settings, "size": fits})


def test_more_of_the_text_is_a_remedy_where_there_is_more(cache):
    settings = {**SETTINGS, "size": 20_000, "sample_bytes": 1_000}
    with pytest.raises(ValueError, match=r"a larger part of it \(sample_bytes, now 1,000\)"):
        train(corpus=Texts({"prose": PROSE}), cache_dir=cache, **settings)
    with pytest.raises(ValueError, match="cannot be trained on these texts: they are empty"):
        train(corpus=Texts({"none": ()}, "none"), cache_dir=cache, **SETTINGS)


def test_unknown_algorithm(cache):
    with pytest.raises(
        ValueError, match="algorithm is 'wordpiece'; it must be one of 'bpe', 'unigram'"
    ):
        train(corpus=Texts({}), cache_dir=cache, **{**SETTINGS, "algorithm": "wordpiece"})


def test_missing_model_file():
    with pytest.raises(
        FileNotFoundError,
        match="no SentencePiece model 'gone.model'.*espalier prepare vocabulary",
    ):
        vocabularies.from_file(path="gone.model")


def test_seqio_encodes_alike_in_python_and_tensorflow(model_path):
    vocabulary = vocabularies.from_file(path=model_path)
    assert vocabulary.vocab_size == 1000 and vocabulary.eos_id == 1 and vocabulary.bos_id == 3
    for text in (*_stdlib("csv.py"), "  é\n\n\t日本 🙂 \r\n1234 "):
        ids = vocabulary.encode(text)
        assert vocabulary.encode_tf(text).numpy().tolist() == list(ids)
        assert vocabulary.decode(ids) == text
    assert vocabularies.byte().encode("é") == [0xC3 + 3, 0xA9 + 3]


def test_pieces_that_begin_with_anothers_text(model_path):
    """For every piece of a vocabulary with sentinels, compared with the texts of all tokens."""
    vocabulary = vocabularies.from_file(path=model_path, extra_ids=3)
    model = vocabulary.tokenizer
    texts = {id: vocabulary.decode([id]) for id in range(4, 1000) if not model.IsByte(id)}
    pieces = Pieces(vocabulary)
    for id, text in texts.items():
        want = {other for other, longer in texts.items() if longer.startswith(text)}
        assert set(pieces.beginning_with(id)) == want
    assert len(pieces.beginning_with(model.PieceToId("\u2581"))) > 100
    for id in (*range(4), model.PieceToId("<0x0A>"), *range(1000, 1003)):
        assert pieces.beginning_with(id) == ()  # special tokens, a byte and sentinels
    assert Pieces(vocabularies.byte()).beginning_with(40) == ()
