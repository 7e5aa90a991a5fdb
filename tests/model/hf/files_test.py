"""Reading and writing weight files: against the safetensors and gguf libraries, and refusals."""

import json
import struct

import gguf
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from espalier.common.checkpoint_files import CheckpointFileError
from espalier.model.hf import registry
from espalier.model.hf.files import gguf_file
from espalier.model.hf.files.safetensors_files import (
    INDEX,
    SINGLE,
    SafetensorsReader,
    SafetensorsWriter,
)
from espalier.model.hf.plan import UnsuitableDtypeError, copy_tiled, plan

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "a": rng.normal(size=(7, 5)).astype(np.float32),
        "b": rng.normal(size=(3, 2, 4)).astype(np.float16),
        "c": rng.integers(-9, 9, 11),
        "d": np.array(rng.normal(), np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }


def test_what_the_library_writes_is_read(tmp_path, tensors):
    safetensors.numpy.save_file(tensors, tmp_path / SINGLE)
    with SafetensorsReader(tmp_path) as reader:
        assert {n: (x.dtype, x.shape) for n, x in reader.tensors.items()} == {
            n: (x.dtype, x.shape) for n, x in tensors.items()
        }
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(reader.read(name), tensor)
        rows = np.empty((3, 5), np.float32)
        reader.read_into("a", 2, rows)
        np.testing.assert_array_equal(rows, tensors["a"][2:5])


def test_what_is_written_the_library_reads(tmp_path, tensors):
    layout = {name: (x.dtype, x.shape) for name, x in tensors.items()}
    with SafetensorsWriter(tmp_path, layout, shard_bytes=150) as writer:
        for name in reversed(tensors):
            if name == "a":
                writer.write(name, tensors[name][4:], 4)
                writer.write(name, tensors[name][:4])
            else:
                writer.write(name, tensors[name])
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    found = {}
    for file in files:
        found |= safetensors.numpy.load_file(tmp_path / file)
        with safetensors.safe_open(tmp_path / file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert all(index["weight_map"][name] == file for name in opened.keys())  # noqa: SIM118
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)
    with SafetensorsReader(tmp_path) as reader:
        np.testing.assert_array_equal(reader.read("a"), tensors["a"])


def test_bfloat16_bits_are_kept(tmp_path):
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)  # NaNs of all kinds too
    with SafetensorsWriter(tmp_path, {"x": (BFLOAT16, bits.shape)}, shard_bytes=1) as writer:
        writer.write("x", bits.view(BFLOAT16))
    with SafetensorsReader(tmp_path) as reader:
        np.testing.assert_array_equal(reader.read("x").view(np.uint16), bits)


def index(folder, name):
    safetensors.numpy.save_file({"x": np.ones(3)}, folder / "model-1.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))


@pytest.mark.parametrize(
    "name", ["../model-1.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "a\\b", "", 3]
)
def test_an_index_that_leaves_its_directory_is_refused(tmp_path, name):
    index(tmp_path, name)
    with pytest.raises(CheckpointFileError, match="plain name|is missing"):
        SafetensorsReader(tmp_path)


def test_two_sets_of_weights_are_refused(tmp_path):
    index(tmp_path, "model-1.safetensors")
    safetensors.numpy.save_file({"x": np.zeros(3)}, tmp_path / SINGLE)
    with pytest.raises(CheckpointFileError, match=f"{INDEX} and {SINGLE}, which it does not name"):
        SafetensorsReader(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": SINGLE}}))
    with SafetensorsReader(tmp_path) as reader:
        assert not reader.read("x").any()


def test_an_adapter_beside_its_base_model_is_read(tmp_path):
    index(tmp_path, "model-1.safetensors")
    safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / "adapter_model.safetensors")
    with SafetensorsReader(tmp_path, single="adapter_model.safetensors") as reader:
        assert list(reader.tensors) == ["a"]


def test_links_are_followed_within_a_checkpoint_only(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    index(tmp_path / "elsewhere", "model-1.safetensors")
    folder = tmp_path / "repository" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (folder / SINGLE).symlink_to(tmp_path / "elsewhere" / "model-1.safetensors")
    with pytest.raises(CheckpointFileError, match="is a link to .*elsewhere"):
        SafetensorsReader(folder)
    blobs = tmp_path / "repository" / "blobs"  # as the hub's cache has it
    (tmp_path / "elsewhere").rename(blobs)
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("../../blobs/model-1.safetensors")
    with SafetensorsReader(folder) as reader:
        assert list(reader.tensors) == ["x"]


def headed(header, data=b"\0" * 8):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(text)) + text + data


def entry(start, stop, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged"),
        (b"\0" * 7, "damaged"),
        (headed(b"{]"), "damaged"),
        (headed({"x": entry(0, 4), "y": entry(2, 6)}, b"\0" * 6), "damaged"),  # overlap
        (headed({"x": entry(0, 4), "y": entry(400, 404)}), "damaged"),  # outside
        (headed({"x": entry(0, 8)}), "damaged"),  # more than the shape takes
        (headed({"x": entry(0, 4, shape=(1 << 62, 1 << 62))}, b"\0" * 4), "damaged"),
        (headed({"x": entry(0, 8, (2,)), "y": entry(8, 16, (2,))}), "damaged"),  # cut short
        (struct.pack("<Q", 1 << 40) + b"{}", "damaged"),  # a header of a terabyte
        (headed({"x": entry(0, 8, (8,), "F8_E8M0")}), "not supported"),
    ],
)
def test_damaged_files_are_one_clear_error(tmp_path, content, words):
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(CheckpointFileError, match=words) as caught:
        SafetensorsReader(tmp_path)
    assert SINGLE in str(caught.value)


def test_a_file_cut_short_while_it_is_open(tmp_path):
    safetensors.numpy.save_file({"x": np.ones(3000)}, tmp_path / SINGLE)
    with SafetensorsReader(tmp_path) as reader:
        with open(tmp_path / SINGLE, "r+b") as file:
            file.truncate(1000)
        with pytest.raises(CheckpointFileError, match="cut short"):
            reader.read("x")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "x.pt"])
def test_pickles_are_not_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/x'\ntR.")
    with pytest.raises(CheckpointFileError, match="safe_serialization=True"):
        SafetensorsReader(tmp_path)


def test_incomplete_checkpoints(tmp_path):
    with pytest.raises(CheckpointFileError, match="has no weights"):
        SafetensorsReader(tmp_path)
    with pytest.raises(CheckpointFileError, match="not a directory"):
        SafetensorsReader(tmp_path / "none")
    index(tmp_path, "model-2.safetensors")
    with pytest.raises(CheckpointFileError, match=r"model-2\.safetensors' is missing"):
        SafetensorsReader(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"y": "model-1.safetensors"}}))
    with pytest.raises(CheckpointFileError, match="lacks y"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize("shape", [(3, 5), (300, 700), (256, 256), (1, 600), (513, 2)])
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, np.float64])
def test_transposed_copies(shape, dtype):
    values = np.random.default_rng(0).normal(size=shape).astype(dtype)
    into = np.zeros((shape[1], shape[0] + 3), dtype)
    copy_tiled(into[:, 2:-1], values.T)
    np.testing.assert_array_equal(into[:, 2:-1], values.T)
    assert not into[:, :2].any() and not into[:, -1].any()


WIDTH, HEADS, KV_HEADS, HEAD = 64, 4, 2, 16


def write_gguf(path, *, architecture="llama", extra=None, metadata=(), bad=None):
    """A model of one layer; returns its tensors by GGUF name, as the file gives them back."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(32)
    for key, value in metadata:
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    shapes = {
        "token_embd.weight": (32, WIDTH),
        "output_norm.weight": (WIDTH,),
        "blk.0.attn_norm.weight": (WIDTH,),
        "blk.0.attn_q.weight": (HEADS * HEAD, WIDTH),
        "blk.0.attn_k.weight": (KV_HEADS * HEAD, WIDTH),
        "blk.0.attn_v.weight": (KV_HEADS * HEAD, WIDTH),
        "blk.0.attn_output.weight": (WIDTH, HEADS * HEAD),
        "blk.0.ffn_norm.weight": (WIDTH,),
        "blk.0.ffn_gate.weight": (96, WIDTH),
        "blk.0.ffn_up.weight": (96, WIDTH),
        "blk.0.ffn_down.weight": (WIDTH, 96),
    }
    stored = {}
    for name, shape in {**shapes, **(extra or {})}.items():
        values = rng.normal(size=shape).astype(np.float32)
        if name == bad:
            values[3] = np.nan
        kind = gguf.GGMLQuantizationType.F32
        if len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
        if "attn_v" in name:
            kind = gguf.GGMLQuantizationType.F16
        data = gguf.quantize(values, kind)
        stored[name] = gguf.dequantize(data, kind).reshape(shape)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def test_gguf_tensors_have_their_hugging_face_names_and_order(tmp_path):
    stored = write_gguf(tmp_path / "x.gguf")
    with gguf_file.GgufReader(tmp_path / "x.gguf") as reader:
        assert len(reader.tensors) == len(stored)
        for name, gguf_name in {
            "model.embed_tokens.weight": "token_embd.weight",
            "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
            "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
            "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
        }.items():
            np.testing.assert_array_equal(reader.read(name), stored[gguf_name])
        for part, heads in (("q", HEADS), ("k", KV_HEADS)):
            found = reader.read(f"model.layers.0.self_attn.{part}_proj.weight")
            rows = np.empty((7, WIDTH), np.float32)
            reader.read_into(f"model.layers.0.self_attn.{part}_proj.weight", 6, rows)
            np.testing.assert_array_equal(rows, found[6:13])
            given = stored[f"blk.0.attn_{part}.weight"]
            for head in range(heads):
                for i in range(HEAD // 2):  # Pair i: neighbours there, half a head apart here.
                    here, there = head * HEAD + i, head * HEAD + 2 * i
                    np.testing.assert_array_equal(found[here], given[there])
                    np.testing.assert_array_equal(found[here + HEAD // 2], given[there + 1])
        assert reader.config["rms_norm_eps"] == 1e-5
        assert reader.config["tie_word_embeddings"] is True


def test_gguf_values_that_are_not_finite_are_refused_by_name(tmp_path):
    write_gguf(tmp_path / "x.gguf", bad="blk.0.ffn_norm.weight")
    with gguf_file.GgufReader(tmp_path / "x.gguf") as reader:
        family = registry.family_of_config(reader.config)
        checked = plan(family, family.model(reader.config), reader)
        name = "model.layers.0.post_attention_layernorm.weight"
        with pytest.raises(UnsuitableDtypeError, match=f"x.gguf: {name} has 1 values of {WIDTH}"):
            for path in checked.arrays:
                list(checked.blocks(path))


def test_gguf_of_qwen_keeps_the_order_of_rows(tmp_path):
    stored = write_gguf(tmp_path / "x.gguf", architecture="qwen2")
    with gguf_file.GgufReader(tmp_path / "x.gguf") as reader:
        found = reader.read("model.layers.0.self_attn.q_proj.weight")
        np.testing.assert_array_equal(found, stored["blk.0.attn_q.weight"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"architecture": "bert"}, "architecture 'bert'"),
        ({"extra": {"rope_freqs.weight": (8,)}}, r"rope_freqs\.weight"),
        ({"metadata": [("llama.rope.scaling.type", "yarn")]}, "stretched"),
        ({"metadata": [("llama.rope.scaling.factor", 4.0)]}, "stretched"),
        ({"metadata": [("llama.rope.scale_linear", 4.0)]}, "stretched"),
        ({"metadata": [("llama.attention.sliding_window", 4)]}, "llama.attention.sliding_window"),
        ({"metadata": [("llama.logit_scale", 0.5)]}, "llama.logit_scale"),
    ],
)
def test_gguf_files_that_would_become_another_model(tmp_path, arguments, words):
    write_gguf(tmp_path / "x.gguf", **arguments)
    with pytest.raises(CheckpointFileError, match=words):
        gguf_file.GgufReader(tmp_path / "x.gguf")


def test_damaged_gguf_files(tmp_path):
    write_gguf(tmp_path / "x.gguf")
    data = (tmp_path / "x.gguf").read_bytes()
    for content in (b"", b"GGUF", b"nothing of the kind" * 9, data[:300], data[: len(data) // 2]):
        (tmp_path / "y.gguf").write_bytes(content)
        with pytest.raises(CheckpointFileError, match="damaged"):
            gguf_file.GgufReader(tmp_path / "y.gguf")
    with pytest.raises(CheckpointFileError, match="not a file"):
        gguf_file.GgufReader(tmp_path / "none.gguf")
