"""Hostile weight files: they load or are one error of the project, without long loops or large allocations."""

import json
import random
import resource
import struct
import time

import gguf
import numpy as np
import pytest
import safetensors.numpy

from espalier.common.checkpoint_files import CheckpointFileError
from espalier.model.hf import registry
from espalier.model.hf.config_fields import UnsupportedConfig
from espalier.model.hf.family import MismatchedTensors
from espalier.model.hf.files import gguf_file
from espalier.model.hf.files.gguf_file import GgufReader
from espalier.model.hf.files.safetensors_files import INDEX, SINGLE, SafetensorsReader, read_json
from tests.model.hf.cases import SMALL

ARRAY, STRING, UINT32 = 9, 8, 4


def text(content):
    content = content.encode()
    return struct.pack("<Q", len(content)) + content


def pair(value, key="k"):
    return text(key) + value


def tensor(*shape, kind=0, offset=0):
    dimensions = struct.pack(f"<{len(shape)}Q", *shape)
    return text("t") + struct.pack("<I", len(shape)) + dimensions + struct.pack("<IQ", kind, offset)


def header(*parts, tensors=0, pairs=0):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + b"".join(parts) + b"\0" * 100


@pytest.mark.parametrize(
    "content",
    [
        header(pair(struct.pack("<IIQ", ARRAY, UINT32, 2**60)), pairs=1),
        header(pair(struct.pack("<IIQ", ARRAY, STRING, 2**22)), pairs=1),
        header(pair(struct.pack("<IIQ", ARRAY, ARRAY, 1) * 2000), pairs=1),
        header(pair(struct.pack("<IIQ", ARRAY, 99, 1)), pairs=1),
        header(pair(struct.pack("<I", 99)), pairs=1),
        header(pair(struct.pack("<IQ", STRING, 2**63)), pairs=1),
        header(struct.pack("<Q", 2**64 - 1), pairs=1),
        header(pairs=2**40),
        header(tensors=2**40),
        header(pairs=2**64 - 1, tensors=2**64 - 1),
        header(tensor(2**32, 2**32), tensors=1),
        header(tensor(2**62), tensors=1),
        header(tensor(1, 1, 1, 1, 1), tensors=1),
        header(tensor(4, kind=12345), tensors=1),
        header(tensor(4, offset=2**63), tensors=1),
        header(text("t"), struct.pack("<I", 2**32 - 1), tensors=1),
    ],
)  # fmt: skip
def test_counts_of_gguf_files_are_checked_before_they_are_used(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    started = time.monotonic()
    with pytest.raises(CheckpointFileError, match="x.gguf is damaged or not a GGUF file"):
        GgufReader(tmp_path / "x.gguf")
    assert time.monotonic() - started < 5


def write_gguf(path, **changes):
    """A model of one layer, whose metadata may be changed."""
    values = {
        **{"block_count": 1, "embedding_length": 8, "feed_forward_length": 4, "context_length": 16},
        **{"attention.head_count": 2, "attention.head_count_kv": 1, "vocab_size": 4},
        **{"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 10000.0},
    }
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {**values, **changes}.items():
        if isinstance(value, str):
            writer.add_string(f"llama.{key}", value)
        elif isinstance(value, list):
            writer.add_array(f"llama.{key}", value)
        else:
            (writer.add_float32 if isinstance(value, float) else writer.add_int32)(
                f"llama.{key}", value
            )
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c", "d"])
    for name, shape in {"token_embd": (4, 8), "output_norm": (8,), "blk.0.attn_q": (8, 8)}.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.head_count", 0),
        ("attention.head_count", -1),
        ("attention.head_count", "two"),
        ("attention.head_count", 2.0),
        ("attention.head_count_kv", 0),
        ("attention.key_length", 0),
        ("embedding_length", 0),
        ("block_count", -2),
        ("vocab_size", 0),
        ("context_length", [1, 2]),
        ("rope.freq_base", 0.0),
        ("rope.freq_base", float("nan")),
        ("attention.layer_norm_rms_epsilon", float("inf")),
        ("attention.layer_norm_rms_epsilon", "small"),
    ],
)
def test_numbers_of_gguf_files_that_no_model_has(tmp_path, key, value):
    write_gguf(tmp_path / "x.gguf", **{key: value})
    with pytest.raises(CheckpointFileError, match=rf"x\.gguf: llama\.{key} is "):
        GgufReader(tmp_path / "x.gguf")


def headed(header, data=b"\0" * 8):
    content = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(content)) + content + data


def entry(start, stop, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "content",
    [
        headed({"x": entry(0, 8, (2, *[1] * 5000))}),
        headed({"x": entry(0, 8, (2, *[1] * 33))}),
        headed(b'{"\\ud800": ' + json.dumps(entry(0, 8, (2,))).encode() + b"}"),
        headed({"x": entry(-8, 0, (2,))}),
        headed({"x": entry(8, 0, (2,))}),
        headed({"x": entry(0, 8, (-2,))}),
        headed({"x": entry(0, 2**64, (2**62,))}),
        headed({"x": entry(0, 8, (0, 2**63))}),
        headed(b'{"x": ' + b"[" * 10_000),
        headed({"x": {**entry(0, 8, (2,)), "dtype": ["F32"]}}),
        headed({"x": 3}),
        headed(b"[]"),
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 99_999_999) + b"{}",
    ],
)
def test_headers_of_safetensors(tmp_path, content):
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(CheckpointFileError, match=SINGLE):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize("name", ["x" * 5000, "\ud800", "x\0y", ".", "loop"])
def test_names_in_an_index(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"t": name}}))
    with pytest.raises(CheckpointFileError) as error:
        SafetensorsReader(tmp_path)
    assert len(str(error.value).encode()) < 1000


def test_settings_are_read_from_the_checkpoint_only(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (tmp_path / "secret").write_text('{"secret": 1}')
    for target in ("../secret", "/dev/zero"):
        (folder / "config.json").symlink_to(target)
        with pytest.raises(CheckpointFileError, match="outside of the checkpoint"):
            read_json(folder / "config.json")
        (folder / "config.json").unlink()
    (folder / "config.json").write_bytes(b" " * ((64 << 20) + 1))
    with pytest.raises(CheckpointFileError, match="longer than 67,108,864 bytes"):
        read_json(folder / "config.json")


def mutations(content, header_bytes, count, seed):
    """Yields copies of a file with some changes, most of them in its header."""
    random_ = random.Random(seed)
    numbers = [0, 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1]
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(random_.randint(1, 4)):
            at = random_.randrange(header_bytes if random_.random() < 0.9 else len(changed))
            new = random_.choice(
                [
                    bytes([random_.randrange(256)]),
                    struct.pack("<Q", random_.choice(numbers)),
                    b"9",
                    b"-1",
                    b'"',
                ]
            )
            if random_.random() < 0.7:
                changed[at : at + len(new)] = new
            else:
                changed[at : at + random_.randrange(20)] = new
        yield bytes(
            changed[: random_.randrange(len(changed))] if random_.random() < 0.1 else changed
        )


def read_safetensors(folder):
    with SafetensorsReader(folder) as reader:
        for name in reader.tensors:
            reader.read(name)


def read_gguf(folder):
    with GgufReader(folder / "x.gguf") as reader:
        reader.tokenizer()
        for name in reader.tensors:
            reader.read(name)


@pytest.mark.parametrize("read", [read_safetensors, read_gguf])
def test_changed_files_load_or_are_the_projects_error(tmp_path, read):
    path = tmp_path / (SINGLE if read is read_safetensors else "x.gguf")
    if read is read_safetensors:
        tensors = {f"t{i}": np.ones((i, 3), np.float32) for i in range(4)}
        safetensors.numpy.save_file(tensors, path)
        size = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    else:
        write_gguf(path)
        size = path.stat().st_size - 700
    content, loaded = path.read_bytes(), 0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for changed in mutations(content, size, 300, seed=0):
        path.write_bytes(changed)
        started = time.monotonic()
        try:
            read(tmp_path)
            loaded += 1
        except CheckpointFileError as error:
            assert str(path) in str(error)
        assert time.monotonic() - started < 5
    assert 0 < loaded < 300
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 500_000  # KB


def test_a_whole_gguf_file_passes_the_check(tmp_path):
    write_gguf(tmp_path / "x.gguf")
    gguf_file._check_header(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_hidden_layers", 10**9, "at most 10,000"),
        ("vocab_size", 2**63, "at most"),
        ("num_hidden_layers", 9000, "9000 layers, but the checkpoint has only 3 tensors"),
    ],
)
def test_sizes_of_a_config_are_checked_before_layers_are_listed(key, value, words):
    config = SMALL["llama2_7b"] | {key: value}
    started = time.monotonic()
    with pytest.raises((UnsupportedConfig, MismatchedTensors), match=words):
        family = registry.family_of_config(config)
        family.match(family.model(config), {"a": (1,), "b": (1,), "c": (1,)})
    assert time.monotonic() - started < 5
