"""Hugging Face tokenizers as SeqIO vocabularies: lossless, the same in TensorFlow, and in tasks."""

import functools
import json
import pathlib
import pickle
import unicodedata

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from espalier.common.checkpoint_files import CheckpointFileError
from espalier.data import seqio_tasks
from espalier.data.cache import fingerprint, store, task_cache
from espalier.data.stream import rows
from espalier.data.tokenizers import hf_tokenizer, vocabularies
from espalier.data.tokenizers.chat_sandbox import Rendered
from espalier.data.tokenizers.pieces import Pieces

# One sentence in each of the 23 languages of Aya 23.
LANGUAGES = {
    "ar": "يولد جميع الناس أحرارًا ومتساوين في الكرامة ١٢٣",
    "zh": "人人生而自由,在尊严和权利上一律平等。",
    "cs": "Všichni lidé rodí se svobodní a sobě rovní.",
    "nl": "Alle mensen worden vrij en gelijk in waardigheid geboren; één voor allen.",
    "en": "All human beings are born free and equal in 1948.",
    "fr": "Tous les êtres humains naissent libres et égaux.",
    "de": "Alle Menschen sind frei und gleich an Würde geboren.",
    "el": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι.",
    "he": "כל בני האדם נולדו בני חורין שָׁלוֹם",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता क़लम",
    "id": "Semua orang dilahirkan merdeka dan mempunyai martabat.",
    "it": "Tutti gli esseri umani nascono liberi ed eguali; perché così è.",
    "ja": "すべての人間は、生まれながらにして自由であり、がぎぐ。",
    "ko": "모든 인간은 태어날 때부터 자유로우며",
    "fa": "تمام افراد بشر آزاد به دنیا می‌آیند آ ۱۲۳",
    "pl": "Wszyscy ludzie rodzą się wolni i równi.",
    "pt": "Todos os seres humanos nascem livres e iguais em direitos, não é?",
    "ro": "Toate ființele umane se nasc libere și egale.",
    "ru": "Все люди рождаются свободными и равными; ёлка, йод.",
    "es": "Todos los seres humanos nacen libres e iguales, ¿señor?",
    "tr": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. İĞ",
    "uk": "Усі люди народжуються вільними; їжак.",
    "vi": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm.",
}
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<|end|>"]
CONFIG = {
    "bos_token": {"content": "<s>", "special": True},
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
}
SIZE = 700


def train():
    """NFC, digits apart, byte-level BPE without a leading space: the pipeline of section 2.6."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [text + " 2024 19 20 24 x10" for text in LANGUAGES.values() for _ in range(3)],
        trainers.BpeTrainer(
            vocab_size=SIZE,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 2)]
    )
    tokenizer.enable_padding(length=64)  # what files say of this must not reach us
    tokenizer.enable_truncation(5)
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    train().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module")
def vocabulary(folder):
    return vocabularies.huggingface(path=folder)


@pytest.fixture
def copy(folder, tmp_path):
    """A directory with the tokenizer and other files beside it."""

    def make(**files):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        for name, value in files.items():
            text = value if isinstance(value, str) else json.dumps(value)
            (tmp_path / f"{name}.json").write_text(text)
        return tmp_path

    return make


def test_all_languages_come_back_in_nfc(vocabulary):
    assert len(LANGUAGES) == 23
    decomposed = 0
    for text in LANGUAGES.values():
        nfc, nfd = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
        ids = vocabulary.encode(nfc)
        assert vocabulary.decode(ids) == nfc
        assert vocabulary.encode(nfd) == ids == vocabulary.encode(text)
        decomposed += nfd != nfc
    assert decomposed >= 15


def test_every_digit_is_a_token(vocabulary):
    tokenizer = hf_tokenizer.load(vocabulary.files.content)
    for text in ("2024", "x10", " 2024"):
        pieces = [tokenizer.id_to_token(id) for id in vocabulary.encode(text)]
        assert [piece for piece in pieces if piece.isdigit()] == [c for c in text if c.isdigit()]
    assert len(vocabulary.encode("2024")) == 4


def test_white_space_and_anything_come_back_exactly(vocabulary):
    for text in ("", " ", "  a\t\n\n b \r\n", "\x00\x7f\u2581🙂👩\u200d🔬", " x", "x "):
        assert vocabulary.decode(vocabulary.encode(text)) == text


def test_ids_and_size(vocabulary):
    assert (vocabulary.pad_id, vocabulary.unk_id, vocabulary.bos_id, vocabulary.eos_id) == (
        0,
        1,
        2,
        3,
    )
    assert vocabulary.eos_ids == (3,)
    assert vocabulary.vocab_size == SIZE
    assert vocabulary.adds_bos
    # Neither BOS, padding nor truncation.
    ids = vocabulary.encode("All human beings are born free")
    assert len(ids) > 5 and not {0, 2} & set(ids)


def test_tensorflow_gives_the_same(vocabulary):
    texts = [*LANGUAGES.values(), "", "<s>a</s>"]
    data = tf.data.Dataset.from_tensor_slices(texts).map(vocabulary.encode_tf)
    assert data.element_spec == tf.TensorSpec([None], tf.int32)
    found = [ids.tolist() for ids in data.as_numpy_iterator()]
    assert found == [vocabulary.encode(text) for text in texts]
    batch = tf.ragged.constant(found, tf.int32).to_tensor(vocabulary.pad_id)
    decoded = [text.decode() for text in vocabulary.decode_tf(batch).numpy()]
    assert decoded == [vocabulary.decode(row) for row in batch.numpy()]
    assert decoded[4].startswith(LANGUAGES["en"])
    assert vocabulary.decode_tf(tf.constant(found[4])).numpy().decode() == LANGUAGES["en"]
    graph = tf.function(
        vocabulary.decode_tf, input_signature=[tf.TensorSpec([None, None], tf.int32)]
    )
    assert graph(batch).numpy().tolist() == [text.encode() for text in decoded]


def test_special_tokens_in_texts(folder, vocabulary):
    assert vocabulary.encode("<s>a<|end|>") == [2, *vocabulary.encode("a"), 4]
    plain = vocabularies.huggingface(path=folder, special_in_text=False)
    ids = plain.encode("<s>a<|end|>")
    assert not {2, 4} & set(ids) and plain.decode(ids) == "<s>a<|end|>"
    assert plain.encode_marked(Rendered("<s>a<|end|>", ()))[0] == vocabulary.encode("<s>a<|end|>")
    (found,) = tf.data.Dataset.from_tensors("<s>").map(plain.encode_tf).as_numpy_iterator()
    assert 2 not in found
    # Caches and checkpoints tell the two apart.
    assert rows.vocabulary_digest(plain) != rows.vocabulary_digest(vocabulary)


def test_decode_stops_at_eos_as_seqio_does(vocabulary):
    a, b = vocabulary.encode("a"), vocabulary.encode("b")
    ids = [2, *a, 3, *b, 3]
    assert vocabulary.decode(ids) == "<s>a</s>"
    assert vocabulary.decode(ids, skip_special_tokens=True) == "a"
    assert vocabulary.decode_all(ids) == "<s>a</s>b</s>"
    assert vocabulary.decode_all(np.asarray(ids), skip_special_tokens=True) == "ab"
    assert vocabulary.decode(tf.constant(a)) == "a"
    # Rows of the model's table that are no entries.
    assert vocabulary.decode([*a, SIZE, SIZE + 50, -1, *b]) == "ab"


def test_the_tokens_of_spans_are_marked(vocabulary):
    text = "<s>All human</s>beings"
    for start in range(len(text) + 1):
        ids, marked = vocabulary.encode_marked(Rendered(text, ((start, len(text)),)))
        assert ids == vocabulary.encode(text)
        before = [id for id, mark in zip(ids, marked, strict=True) if not mark]
        assert len(vocabulary.decode_all(before)) <= start and marked == sorted(marked)
        if start == 16:
            assert ids[len(before) :] == vocabulary.encode("beings")


def test_a_post_processor_that_trims_offsets_changes_no_marks(copy, vocabulary):
    record = json.loads(vocabulary.files.content)
    text, marks = "A: 7 U", []
    for trim in (False, True):
        record["post_processor"] = {"type": "ByteLevel", "trim_offsets": trim, "use_regex": True}
        record["post_processor"]["add_prefix_space"] = False
        record["model"]["merges"] = []  # so that spaces are tokens
        made = vocabularies.huggingface(path=copy(tokenizer=json.dumps(record)))
        ids, marked = made.encode_marked(Rendered(text, ((3, 5),)))
        assert [made.decode_all([id]) for id in ids] == list(text)
        marks.append(marked)
    assert marks == [[place in (3, 4) for place in range(6)]] * 2


def test_extra_ids_follow_the_entries_the_last_first(folder, vocabulary):
    found = vocabularies.huggingface(path=folder, extra_ids=3)
    assert (found.vocab_size, found.extra_ids) == (SIZE + 3, 3)
    assert found.encode("<extra_id_0>a<extra_id_2>") == [SIZE + 2, *vocabulary.encode("a"), SIZE]
    assert found.decode([SIZE + 1]) == "<extra_id_1>"
    assert rows.vocabulary_digest(found) != rows.vocabulary_digest(vocabulary)
    twice = hf_tokenizer.load(found._tokenizer().to_str().encode())
    with pytest.raises(CheckpointFileError, match="already has <extra_id_0>"):
        hf_tokenizer.load(twice.to_str().encode(), extra_ids=1)


def test_it_is_the_same_after_pickling_and_from_another_place(vocabulary, copy):
    digest = rows.vocabulary_digest(vocabulary)
    again = pickle.loads(pickle.dumps(vocabulary))
    assert again == vocabulary and again.encode("naïve 12") == vocabulary.encode("naïve 12")
    assert rows.vocabulary_digest(again) == digest
    moved = copy(generation_config={"eos_token_id": [3, 4]})
    (moved / "chat_template.jinja").write_text("x")
    other = vocabularies.huggingface(path=moved)
    assert other.eos_ids == (3, 4)
    assert other == vocabulary and rows.vocabulary_digest(other) == digest
    # One changed merge is another vocabulary.
    content = json.loads(vocabulary.files.content)
    content["model"]["merges"][-1:] = []
    changed = vocabularies.huggingface(path=copy(tokenizer=content))
    assert changed != vocabulary and rows.vocabulary_digest(changed) != digest
    assert fingerprint.vocabulary(vocabulary)["size"] == SIZE


def test_what_ends_a_continuation(copy):
    def ends(**files):
        return hf_tokenizer.read(copy(**files)).eos_ids

    assert ends() == (3,)
    assert ends(config={"eos_token_id": 4}) == (4,)
    assert ends(config={"eos_token_id": 4}, generation_config={"eos_token_id": [4, 3]}) == (4, 3)
    with pytest.raises(CheckpointFileError, match="generation_config.json: eos_token_id is '</s>'"):
        ends(generation_config={"eos_token_id": "</s>"})


def test_whether_texts_begin_with_bos(copy, vocabulary):
    def adds(config, content=None):
        content = content or vocabulary.files.content.decode()
        return hf_tokenizer.read(copy(tokenizer_config=config, tokenizer=content)).adds_bos

    assert adds(CONFIG)  # by its post-processor
    assert not adds({**CONFIG, "add_bos_token": False})  # which loaders obey
    bare = json.dumps({**json.loads(vocabulary.files.content), "post_processor": None})
    assert not adds(CONFIG, bare)
    assert adds({**CONFIG, "add_bos_token": True}, bare)
    assert not adds({"eos_token": "</s>", "add_bos_token": True}, bare)  # there is none


def test_names_of_special_tokens_may_stand_in_their_own_file(copy):
    special = {"bos_token": "<|end|>", "eos_token": {"content": "</s>"}}
    path = copy(tokenizer_config={"bos_token": "<s>"}, special_tokens_map=special)
    files = hf_tokenizer.read(path)
    assert (files.id("bos_token"), files.id("eos_token"), files.id("pad_token")) == (2, 3, None)
    found = vocabularies.huggingface(path=path)
    assert (found.pad_id, found.unk_id) == (None, None)
    assert found.decode([*found.encode("a"), 3, 5]) == "a</s>"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer": "{"}, "tokenizer.json is damaged or not a tokenizer"),
        ({"tokenizer": {"a": 1}}, "tokenizer.json is damaged or not a tokenizer"),
        ({"tokenizer_config": "{"}, "tokenizer_config.json is damaged"),
        ({"tokenizer_config": []}, "tokenizer_config.json is not a JSON object"),
        (
            {"tokenizer_config": {"bos_token": "[B]"}},
            r"bos_token is '\[B\]', which tokenizer.json does",
        ),
    ],
)
def test_damaged_files_are_named(copy, files, message):
    with pytest.raises(CheckpointFileError, match=message):
        vocabularies.huggingface(path=copy(**files))


def test_missing_files_are_named(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match="tokenizer files"):
            vocabularies.huggingface(path=path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="from_file"):
        hf_tokenizer.read(tmp_path)


def test_a_sentencepiece_model_alone_is_read_as_such(tmp_path):
    model = pathlib.Path(seqio.__file__).parent / "test_data/sentencepiece/sentencepiece.model"
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    found = vocabularies.huggingface(path=tmp_path, extra_ids=2)
    assert rows.vocabulary_digest(found) == rows.vocabulary_digest(
        vocabularies.from_file(path=model, extra_ids=2)
    )
    with pytest.raises(ValueError, match="special_in_text = False needs a tokenizer.json"):
        vocabularies.huggingface(path=tmp_path, special_in_text=False)


def test_tasks_are_tokenised_with_it_and_cached(vocabulary, folder, tmp_path):
    def dataset(split, shuffle_files=False, seed=None):
        return tf.data.Dataset.from_tensor_slices({"text": list(LANGUAGES.values())})

    def add(made):
        if "hf_test" in seqio.TaskRegistry.names():
            seqio.TaskRegistry.remove("hf_test")
        return seqio.TaskRegistry.add(
            "hf_test",
            source=seqio.FunctionDataSource(dataset, splits=["train"]),
            preprocessors=[
                functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"}),
                seqio.preprocessors.tokenize,
                seqio_tasks.prepend_bos,
                seqio.preprocessors.append_eos,
            ],
            output_features={"targets": seqio.Feature(made, add_eos=True)},
        )

    opened = task_cache.open_task_cache(add(vocabulary), "train", cache_dir=tmp_path)
    for record, text in enumerate(LANGUAGES.values()):
        ids = opened.columns["targets"].values(record).tolist()
        assert ids == [2, *vocabulary.encode(text), 3]
    # Found again with the same files, refused with other ones.
    again = add(vocabularies.huggingface(path=folder))
    assert (
        task_cache.open_task_cache(again, "train", cache_dir=tmp_path).directory == opened.directory
    )
    with pytest.raises(store.CacheMismatchError):
        other = vocabularies.huggingface(path=folder, special_in_text=False)
        task_cache.open_task_cache(add(other), "train", cache_dir=tmp_path)
    seqio.TaskRegistry.remove("hf_test")


def test_pieces_that_begin_with_anothers_text(folder):
    """For every token, compared with the bytes of all tokens; a piece may end within a character, a prompt may not."""
    vocabulary = vocabularies.huggingface(path=folder, extra_ids=2)
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in plain)
    byte_of = {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
    tokenizer = hf_tokenizer.load(vocabulary.files.content)
    texts = {
        id: bytes(byte_of[letter] for letter in tokenizer.id_to_token(id))
        for id in range(len(SPECIAL), SIZE)
    }
    pieces, whole = Pieces(vocabulary), 0
    for id, text in texts.items():
        want = {other for other, longer in texts.items() if longer.startswith(text)}
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:
            want = set()
        assert set(pieces.beginning_with(id)) == want
        whole += len(want) > 1
    assert whole > 50
    for id in (*range(len(SPECIAL)), SIZE, SIZE + 1):
        assert pieces.beginning_with(id) == ()
