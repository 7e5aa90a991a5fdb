"""The row about damaged files of weights: safetensors and GGUF."""

import functools
import json
import pathlib
import resource
import struct
from collections.abc import Callable, Iterator
from typing import Any

from tests.faults import calls
from tests.faults.hostile import checkpoint
from tests.faults.table import Bench, Case, Row, Unclear


def _weights(seed: int) -> Iterator[Case]:
    for number in range(16):
        act = functools.partial(_fuzz_safetensors, f"{seed} {number}")
        yield Case(f"25 changed safetensors files, {number}", act)
    for number in range(6):
        act = functools.partial(_fuzz_gguf, f"{seed} {number}")
        yield Case(f"25 changed GGUF files, {number}", act)
    for name, content in _HEADERS.items():
        yield Case(name, functools.partial(_header, content))
    for name, content in _GGUF.items():
        yield Case(name, functools.partial(_gguf_header, content))


def _headed(header: Any, data: bytes = bytes(8)) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + data


def _entry(start: int, stop: int, *shape: int, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


_HEADERS: dict[str, bytes] = {
    "33 dimensions": _headed({"x": _entry(0, 8, 2, *[1] * 32)}),
    "overlapping tensors": _headed({"x": _entry(0, 8, 2), "y": _entry(4, 8, 1)}),
    "a hole between tensors": _headed({"x": _entry(4, 8, 1)}),
    "a tensor beyond the file": _headed({"x": _entry(0, 4000, 1000)}),
    "offsets backwards": _headed({"x": _entry(8, 0, 2)}),
    "negative offsets": _headed({"x": _entry(-8, 0, 2)}),
    "a negative shape": _headed({"x": _entry(0, 8, -2)}),
    "2^62 numbers": _headed({"x": _entry(0, 2**64, 2**62)}),
    "an unknown dtype": _headed({"x": _entry(0, 8, 2, dtype="F33")}),
    "a dtype that is a list": _headed({"x": _entry(0, 8, 2, dtype=["F32"])}),
    "another shape than size": _headed({"x": _entry(0, 8, 3)}),
    "a list as header": _headed(b"[]"),
    "NaN as header": _headed(b"NaN"),
    "NaN as offset": _headed(b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [NaN, 8]}}'),
    "10,000 nested lists": _headed(b'{"x": ' + b"[" * 10_000),
    "a lone surrogate": _headed(
        b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
    ),
    "not UTF-8": _headed(b'{"\xff": 1}'),
    "a header of 2^64 bytes": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a header of 100 MB": struct.pack("<Q", 99_999_999) + b"{}",
    "an empty file": b"",
    "seven bytes": bytes(7),
}


def _gguf(*parts: bytes, tensors: int = 0, pairs: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + b"".join(parts) + bytes(100)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


_GGUF: dict[str, bytes] = {
    "GGUF with 2^60 values": _gguf(_text("k") + struct.pack("<IIQ", 9, 4, 2**60), pairs=1),
    "GGUF with nested arrays": _gguf(_text("k") + struct.pack("<IIQ", 9, 9, 1) * 2000, pairs=1),
    "GGUF with 2^40 tensors": _gguf(tensors=2**40),
    "GGUF with 2^64 pairs": _gguf(pairs=2**64 - 1),
    "GGUF with a text of 2^63 bytes": _gguf(_text("k") + struct.pack("<IQ", 8, 2**63), pairs=1),
    "GGUF with an unknown type": _gguf(_text("k") + struct.pack("<I", 99), pairs=1),
    "GGUF with 2^32 dimensions": _gguf(_text("t") + struct.pack("<I", 2**32 - 1), tensors=1),
    "GGUF without an architecture": _gguf(),
    "GGUF of another version": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
    "GGUF cut after its name": b"GGUF",
}


def _header(content: bytes, bench: Bench) -> None:
    folder = checkpoint.write(bench.folder / "hf")
    (folder / "model.safetensors").write_bytes(content)
    checkpoint.check_refused(bench, folder, "model.safetensors")


def _gguf_header(content: bytes, bench: Bench) -> None:
    (bench.folder / "x.gguf").write_bytes(content)
    flags = [f"--from_gguf={bench.folder / 'x.gguf'}", f"--to={bench.folder / 'run'}"]
    calls.refused("convert", flags, "x.gguf")


def _changed(content: bytes, head: int, choice: Any) -> bytes:
    """Returns a copy with one to four changes, most of them in its first `head` bytes."""
    changed = bytearray(content)
    numbers = (0, 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1)
    for _ in range(choice.randint(1, 4)):
        at = choice.randrange(min(head, len(changed)) if choice.random() < 0.9 else len(changed))
        new = choice.choice(
            (
                bytes([choice.randrange(256)]),
                struct.pack("<Q", choice.choice(numbers)),
                b"9",
                b"-1",
                b"",
            )
        )
        changed[at : at + len(new)] = new
        if not new:
            del changed[at:]
    return bytes(changed)


def _fuzz_safetensors(key: str, bench: Bench) -> int:
    from espalier.common.checkpoint_files import CheckpointFileError
    from espalier.model.hf.files.safetensors_files import SafetensorsReader

    choice, folder = bench.random(key), checkpoint.write(bench.folder / "hf")
    path = folder / "model.safetensors"
    content = path.read_bytes()
    head = 8 + struct.unpack("<Q", content[:8])[0]

    def read() -> None:
        with SafetensorsReader(folder) as reader:
            for name in reader.tensors:
                reader.read(name)

    return _fuzz(read, path, content, head, choice, CheckpointFileError)


def _fuzz_gguf(key: str, bench: Bench) -> int:
    from espalier.common.checkpoint_files import CheckpointFileError
    from espalier.model.hf.config_fields import UnsupportedConfig
    from espalier.model.hf.files.gguf_file import GgufReader

    path = bench.folder / "x.gguf"
    pairs = {"general.architecture": "llama", "general.name": "x"}
    parts = [_text(k) + struct.pack("<I", 8) + _text(v) for k, v in pairs.items()]
    numbers = {"block_count": 1, "embedding_length": 8, "feed_forward_length": 12}
    numbers |= {"attention.head_count": 2, "context_length": 32, "vocab_size": 4}
    parts += [_text(f"llama.{k}") + struct.pack("<II", 4, v) for k, v in numbers.items()]
    tensor = _text("token_embd.weight") + struct.pack("<IQQIQ", 2, 8, 4, 0, 0)
    content = _gguf(*parts, tensor, tensors=1, pairs=len(parts)) + bytes(128)

    def read() -> None:
        with GgufReader(path):
            pass

    head = len(content) - 228
    choice = bench.random(key)
    return _fuzz(read, path, content, head, choice, CheckpointFileError, UnsupportedConfig)


def _fuzz(
    read: Callable[[], None],
    path: pathlib.Path,
    content: bytes,
    head: int,
    choice: Any,
    *errors: type[Exception],
) -> int:
    """Reads 25 changed files, each of which loads or is one clear error, in little memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(25):
        path.write_bytes(_changed(content, head, choice))
        try:
            read()
        except errors as error:
            if path.parent.name not in str(error) and path.name not in str(error):
                raise Unclear(f"the error names no file: {str(error)[:300]}") from error
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if grown > 500_000:
        raise Unclear(f"memory has grown by {grown // 1000} MB")
    return 25


ROWS = (
    Row(
        15,
        "safetensors and GGUF files: fuzzed, huge, overlapping",
        "read, or one error with the file's name; no crash, little memory",
        _weights,
        sample=4,
    ),
)
