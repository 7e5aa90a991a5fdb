"""Reads GGUF files of Llama-like models as the Hugging Face checkpoints they were made from.

GGUF tensors have other names and are quantised. The reader returns them as float32, one at a time, and
builds a config.json from the file's metadata. Files of architecture `llama` store the rows of query and
key heads in interleaved rotary order (dimensions i and i + H/2 adjacent); the reader restores the order.

A file begins with a magic number, its version, the numbers of tensors and of key-value pairs; then the pairs, then name,
shape, type and offset of each tensor. Its counts and lengths are checked before the library `gguf` loops and allocates by
them.
"""

import math
import mmap
import os
import pathlib
import re
import struct
from typing import Any, BinaryIO

import gguf
import numpy as np

from espalier.common.checkpoint_files import CheckpointFileError
from espalier.model.hf.files.safetensors_files import TensorInfo, TensorReader
from espalier.model.hf.registry import family_named

# Values of general.architecture; each is the model_type of its family.
_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Entries of an architecture that say nothing of the computation.
_SILENT = {
    *("tensor_data_layout", "expert_used_count"),
    *("rope.scaling.original_context_length", "rope.scaling.finetuned"),
}
# Of a header: the types of entries, and the most that any model needs.
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by type
_MIN_PAIR = 8 + 4 + 1  # bytes of the shortest pair: the length of its key, its type, its value
_MIN_TENSOR = 8 + 4 + 4 + 8
_MAX_ITEMS = 1 << 22  # of all arrays together; the library needs about 1 KB for each
_MAX_COUNT = 1 << 20  # pairs, and tensors
_MAX_DIMENSIONS = 4  # as GGML has


class GgufReader(TensorReader):
    """The tensors of a file under their Hugging Face names.

    Attributes:
      config: the contents of the equivalent config.json.

    Raises:
      CheckpointFileError: the file is damaged, or its architecture or quantisation is not supported.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise CheckpointFileError(f"{self.path} is not a file: give a .gguf file.")
        try:
            _check_header(self.path)
            self.reader = gguf.GGUFReader(self.path)
        except (ValueError, LookupError, TypeError, OverflowError, MemoryError, OSError) as error:
            raise CheckpointFileError(
                f"{self.path} is damaged or not a GGUF file ({error}). Copy or download it again."
            ) from None
        self._read = set[str]()
        self._architecture = self.metadata("general.architecture")
        if self._architecture not in _ARCHITECTURES:
            raise CheckpointFileError(
                f"{self.path} has architecture {self._architecture!r}; supported are "
                f"{', '.join(_ARCHITECTURES)}. Import the model's safetensors with --from_hf."
            )
        self.config = self._config()
        self._refuse_unread()
        self.tensors: dict[str, TensorInfo] = {}
        self._stored: dict[str, Any] = {}
        for tensor in self.reader.tensors:
            name = self._hf_name(tensor.name)
            shape = tuple(int(size) for size in reversed(tensor.shape))
            self.tensors[name] = TensorInfo(np.dtype(np.float32), shape, self.path)
            self._stored[name] = tensor
        self._check_types()
        if self._architecture == "llama":
            self.config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in self.tensors
        self.config["tie_word_embeddings"] = "lm_head.weight" not in self.tensors

    def metadata(self, key: str, default: Any = None) -> Any:
        """Returns a value of the file's metadata."""
        field = self.reader.get_field(key)
        try:
            return default if field is None else field.contents()
        except ValueError as error:
            raise CheckpointFileError(f"{self.path}: {key} is not valid UTF-8 ({error}).") from None

    def tokenizer(self) -> dict[str, Any]:
        """Returns the metadata of the tokenizer."""
        names = [name for name in self.reader.fields if name.startswith("tokenizer.")]
        return {name: self.metadata(name) for name in names}

    def _number(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        key = f"{self._architecture}.{key}"
        value = self.metadata(key, default)
        if value is None or isinstance(value, list):
            problem = "is a list" if isinstance(value, list) else "is missing"
            raise CheckpointFileError(
                f"{self.path}: {key} {problem}, but the model is built from its value. Import the model's "
                "safetensors with --from_hf."
            )
        return value

    def _count(self, key: str, default: Any = None) -> int:
        """Returns a whole number above 0."""
        value = self._number(key, default)
        if type(value) is not int or value < 1:
            self._invalid(key, value, "a whole number above 0")
        return value

    def _positive(self, key: str, default: Any = None) -> float:
        """Returns a number above 0, as the shortest decimal."""
        value = self._number(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            self._invalid(key, value, "a number above 0")
        return _shortest(value)

    def _invalid(self, key: str, value: Any, expected: str) -> None:
        raise CheckpointFileError(
            f"{self.path}: {self._architecture}.{key} is {str(value)[:100]!r}, not {expected}. Copy or "
            "download the file again."
        )

    def _config(self) -> dict[str, Any]:
        if self._number("expert_count", 0):
            self._unsupported("experts")
        heads, width = self._count("attention.head_count"), self._count("embedding_length")
        tokens = self.metadata("tokenizer.ggml.tokens", [])
        tokens = tokens if isinstance(tokens, list) else []
        base = self._positive("rope.freq_base", 10_000.0)
        head_dim = self._count("attention.key_length", width // heads)
        if self._number("attention.value_length", head_dim) != head_dim:
            self._unsupported("values wider or narrower than keys")
        if self._number("rope.dimension_count", head_dim) != head_dim:
            self._unsupported("rotation of a part of each head")
        # Files without a type stretch linearly; the oldest ones have `rope.scale_linear`.
        factors = (self._number(f"rope.{key}", 1) for key in ("scaling.factor", "scale_linear"))
        if self._number("rope.scaling.type", "none") != "none" or set(factors) - {0, 1}:
            self._unsupported("stretched rotary embeddings")
        config = {
            "model_type": self._architecture,
            "architectures": [family_named(self._architecture).architecture],
            "vocab_size": self._count("vocab_size", len(tokens) or None),
            "hidden_size": width,
            "intermediate_size": self._count("feed_forward_length"),
            "num_hidden_layers": self._count("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._count("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self._count("context_length"),
            "rms_norm_eps": self._positive("attention.layer_norm_rms_epsilon"),
            "rope_theta": base,
            "rope_scaling": None,
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": "float32",
            "bos_token_id": self.metadata("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.metadata("tokenizer.ggml.eos_token_id"),
        }
        if self._architecture != "llama":
            del config["mlp_bias"]
            config |= {"use_sliding_window": False, "sliding_window": None}
        return config

    def _refuse_unread(self) -> None:
        prefix = f"{self._architecture}."
        own = {x.removeprefix(prefix) for x in self.reader.fields if x.startswith(prefix)}
        if unread := sorted(own - self._read - _SILENT):
            raise CheckpointFileError(
                f"{self.path}: {', '.join(prefix + key for key in unread)}: not known here, so the model might compute something "
                "else. Import the model's safetensors with --from_hf."
            )

    def _unsupported(self, feature: str) -> None:
        raise CheckpointFileError(
            f"{self.path}: {feature} are not supported in GGUF files. Import the model's safetensors "
            "with --from_hf."
        )

    def _hf_name(self, name: str) -> str:
        stem, _, kind = name.rpartition(".")
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if layer and layer[2] in _LAYER_NAMES:
            return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{kind}"
        if stem in _NAMES:
            return f"{_NAMES[stem]}.{kind}"
        raise CheckpointFileError(
            f"{self.path}: the tensor {name} is not supported, and the model would be wrong without it. "
            "Import the model's safetensors with --from_hf."
        )

    def _interleaved_heads(self, name: str) -> int:
        if self._architecture != "llama":
            return 0
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        return next((self.config[key] for part, key in heads.items() if f".{part}." in name), 0)

    def _check_types(self) -> None:
        for kind in {tensor.tensor_type for tensor in self._stored.values()}:
            try:
                block, size = gguf.GGML_QUANT_SIZES[kind]
                gguf.dequantize(np.zeros((1, size), np.uint8), kind)
            except (NotImplementedError, KeyError):
                raise CheckpointFileError(
                    f"{self.path} has tensors of type {kind.name}, which cannot be dequantised. Use a "
                    "file of another quantisation, such as Q8_0 or Q4_K_M."
                ) from None

    def read_into(self, name: str, start: int, into: np.ndarray) -> None:
        """Fills an array with a tensor's rows from `start` on, dequantised."""
        tensor, heads = self._stored[name], self._interleaved_heads(name)
        rows = slice(start, start + len(into))
        # Each row is quantised separately, so rows can be reordered before dequantisation.
        order = np.arange(self.tensors[name].shape[0])
        part = tensor.data[half_split(order, heads)[rows] if heads else rows]
        into[...] = gguf.dequantize(part, tensor.tensor_type).reshape(into.shape)
        # Release the pages that have been read: they count as used memory.
        if isinstance(self.reader.data.base, mmap.mmap):
            self.reader.data.base.madvise(mmap.MADV_DONTNEED)


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Returns the rows of each of `heads` heads in half-split order: 0, 2, 4, ..., then 1, 3, 5, ..."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _shortest(value: float) -> float:
    """Returns the shortest decimal that rounds to a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _check_header(path: str | os.PathLike) -> None:
    """Raises ValueError if a count or length does not fit the file, or is larger than any model needs."""
    with open(path, "rb") as file:
        cursor = _Cursor(file)
        if cursor.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if cursor.number("I") & 0xFFFF == 0:
            cursor.order = ">"
        tensors, pairs = cursor.number("Q"), cursor.number("Q")
        if max(tensors, pairs) > _MAX_COUNT:
            raise ValueError(f"it has {tensors} tensors and {pairs} entries")
        cursor.need(pairs * _MIN_PAIR + tensors * _MIN_TENSOR)
        for _ in range(pairs):
            cursor.skip(cursor.number("Q"))
            cursor.skip_value(cursor.number("I"))
        for _ in range(tensors):
            cursor.skip(cursor.number("Q"))
            _check_tensor(cursor)


def _check_tensor(cursor: "_Cursor") -> None:
    count = cursor.number("I")
    if count > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor has {count} dimensions")
    shape = [cursor.number("Q") for _ in range(count)]
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(cursor.number("I"))]
    cursor.number("Q")
    if math.prod(shape) // block * size > cursor.size:
        raise ValueError(f"a tensor of shape {shape} is larger than the file")


class _Cursor:
    """A place in a file; reading past its end raises ValueError."""

    def __init__(self, file: BinaryIO):
        self.size = os.fstat(file.fileno()).st_size
        self.order = "<"
        self._file = file
        self._left = self.size
        self._items = 0

    def need(self, count: int) -> None:
        if count > self._left:
            raise ValueError(f"{count} bytes are to follow, but only {self._left} do")

    def take(self, count: int) -> bytes:
        self.need(count)
        self._left -= count
        return self._file.read(count)

    def skip(self, count: int) -> None:
        self.need(count)
        self._left -= count
        self._file.seek(count, os.SEEK_CUR)

    def number(self, code: str) -> int:
        content = self.take(struct.calcsize("=" + code))
        return struct.unpack(self.order + code, content)[0]

    def skip_value(self, kind: int) -> None:
        if kind == _STRING:
            self.skip(self.number("Q"))
        elif kind == _ARRAY:
            self._skip_array(self.number("I"), self.number("Q"))
        elif kind in _SIZES:
            self.skip(_SIZES[kind])
        else:
            raise ValueError(f"an entry has the unknown type {kind}")

    def _skip_array(self, kind: int, count: int) -> None:
        self._items += count
        if self._items > _MAX_ITEMS:
            raise ValueError(f"its lists have {self._items} items")
        if kind == _STRING:
            for _ in range(count):
                self.skip(self.number("Q"))
        elif kind in _SIZES:
            self.skip(count * _SIZES[kind])
        else:
            raise ValueError(f"a list has items of type {kind}")
