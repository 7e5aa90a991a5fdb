"""Rows about files of others: configs that lie, damaged weights, pickles, paths, code, chat templates, tokenizers."""

import functools
import hashlib
import io
import json
import os
import pathlib
import pickle
import resource
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from launch.reliability import calls
from launch.reliability.table import Bench, Case, Row, Silent, Unclear, refused

_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 11,
}


def _tensors() -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (11, 8), "model.norm": (8,)}
    shapes["lm_head"] = (11, 8)
    for i in range(2):
        layer = f"model.layers.{i}."
        shapes |= {layer + "input_layernorm": (8,), layer + "post_attention_layernorm": (8,)}
        shapes |= {f"{layer}self_attn.{x}_proj": (8, 8) for x in "qo"}
        shapes |= {f"{layer}self_attn.{x}_proj": (4, 8) for x in "kv"}
        shapes |= {f"{layer}mlp.{x}_proj": (12, 8) for x in ("gate", "up")}
        shapes[layer + "mlp.down_proj"] = (8, 12)
    random_ = np.random.default_rng(0)
    return {f"{n}.weight": random_.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def _checkpoint(folder: pathlib.Path, **changes: Any) -> pathlib.Path:
    """Writes a small Llama checkpoint; a change to None removes a field of its config."""
    import safetensors.numpy

    folder.mkdir(parents=True)
    config = {k: v for k, v in {**_CONFIG, **changes}.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(_tensors(), folder / "model.safetensors")
    return folder


def _import(bench: Bench, folder: pathlib.Path, *words: str) -> None:
    """Imports a checkpoint, which must be refused and leave nothing."""
    target = bench.folder / "run"
    calls.refused("convert", [f"--from_hf={folder}", f"--to={target}"], *words)
    if target.exists():
        raise Unclear("a refused import has left a run")


_LIES: tuple[dict[str, Any], ...] = (
    *({"num_attention_heads": x} for x in (4, 3, 0, -1, "2", 2.5, [2], 10**30)),
    *({"num_key_value_heads": x} for x in (2, 3, 0, -1, "1", True)),
    *({"vocab_size": x} for x in (10, 12, 0, -1, 10**12, "11")),
    *({"hidden_size": x} for x in (4, 16, 0, 7, 10**9, None)),
    *({"intermediate_size": x} for x in (11, 13, 0, None, "12")),
    *({"num_hidden_layers": x} for x in (1, 3, 0, -2, 10**9, None)),
    *({"head_dim": x} for x in (8, 0, -4, "4")),
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": "false"},
    *({"rope_theta": x} for x in (0, -1.0, "big", None, float("nan"))),
    *({"rms_norm_eps": x} for x in (0, -1.0, "small", float("inf"))),
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "linear"}},
    {"rope_scaling": "linear"},
    {"hidden_act": "no_such"},
    {"hidden_act": 3},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"sliding_window": 4, "model_type": "mistral", "architectures": ["LlamaForCausalLM"]},
    {"model_type": "t5"},
    {"model_type": None, "architectures": None},
    {"model_type": ["llama"]},
    {"architectures": "LlamaForCausalLM", "model_type": 3},
    {"quantization_config": {"quant_method": "gptq"}},
)


def _lies(seed: int) -> Iterator[Case]:
    del seed
    for number, changes in enumerate(_LIES):
        yield Case(f"{number}: {json.dumps(changes)}", functools.partial(_lie, changes))


def _lie(changes: dict[str, Any], bench: Bench) -> None:
    _import(bench, _checkpoint(bench.folder / "hf", **changes))


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
    folder = _checkpoint(bench.folder / "hf")
    (folder / "model.safetensors").write_bytes(content)
    _import(bench, folder, "model.safetensors")


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
    from model.hf.files.safetensors_files import SafetensorsReader, WeightFileError

    choice, folder = bench.random(key), _checkpoint(bench.folder / "hf")
    path = folder / "model.safetensors"
    content = path.read_bytes()
    head = 8 + struct.unpack("<Q", content[:8])[0]

    def read() -> None:
        with SafetensorsReader(folder) as reader:
            for name in reader.tensors:
                reader.read(name)

    return _fuzz(read, path, content, head, choice, WeightFileError)


def _fuzz_gguf(key: str, bench: Bench) -> int:
    from model.hf.config_fields import UnsupportedConfig
    from model.hf.files.gguf_file import GgufReader
    from model.hf.files.safetensors_files import WeightFileError

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
    return _fuzz(read, path, content, head, choice, WeightFileError, UnsupportedConfig)


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


class _Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: pathlib.Path):
        self._path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self._path,)


def _pickles(seed: int) -> Iterator[Case]:
    del seed
    for name in (
        "pytorch_model.bin",
        "model.pt",
        "model.pth",
        "consolidated.00.pth",
        "adapter.bin",
    ):
        yield Case(f"weights in {name}", functools.partial(_pickled_weights, name, False))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "x.npy", "x.pkl"):
        act = functools.partial(_pickled_weights, name, True)
        yield Case(f"{name} beside safetensors", act)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        yield Case(f"{name} is a pickle", functools.partial(_pickled_file, name))
    yield Case("a GGUF file is a pickle", _pickled_gguf)
    for name in ("x.npy", "x.npz"):
        yield Case(f"a part of a reference store is {name}", functools.partial(_pickled_part, name))


def _written(path: pathlib.Path, bench: Bench) -> None:
    payload = _Payload(bench.folder / "executed")
    if path.suffix == ".npy":
        np.save(path, np.array([payload], object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(payload))


def _not_executed(bench: Bench) -> None:
    if (bench.folder / "executed").exists():
        raise Silent("the pickle was executed")


def _pickled_weights(name: str, beside: bool, bench: Bench) -> None:
    folder = _checkpoint(bench.folder / "hf")
    _written(folder / name, bench)
    if beside:
        status, text = calls.call(
            "convert", [f"--from_hf={folder}", f"--to={bench.folder / 'run'}"]
        )
        if status not in (0, 2):
            raise Unclear(f"status {status}: ...{text[-300:]}")
    else:
        (folder / "model.safetensors").unlink()
        _import(bench, folder)
    _not_executed(bench)


def _pickled_file(name: str, bench: Bench) -> None:
    folder = _checkpoint(bench.folder / "hf")
    (folder / "tokenizer.json").write_text("{}")
    _written(folder / name, bench)
    _import(bench, folder, name if name != "tokenizer_config.json" else "tokenizer")
    _not_executed(bench)


def _pickled_gguf(bench: Bench) -> None:
    _written(bench.folder / "x.gguf", bench)
    flags = [f"--from_gguf={bench.folder / 'x.gguf'}", f"--to={bench.folder / 'run'}"]
    calls.refused("convert", flags, "x.gguf")
    _not_executed(bench)


def _pickled_part(name: str, bench: Bench) -> None:
    """Puts a pickle, with the hash that its name must have, in the place of stored numbers."""
    from data.preference.reference_store import ABOUT, ReferenceStore, ReferenceStoreError

    folder, content = bench.folder / "store" / "m", io.BytesIO()
    folder.mkdir(parents=True)
    (folder / ABOUT).write_text('{"model": "m"}')
    values = np.array([_Payload(bench.folder / "executed")], object)
    if name == "x.npz":
        np.savez(content, digests=values, values=values)
    else:
        np.save(content, values, allow_pickle=True)
    part = folder / f"{hashlib.sha256(content.getvalue()).hexdigest()}.npz"
    part.write_bytes(content.getvalue())
    refused(lambda: ReferenceStore("m", {}, root=bench.folder / "store"), ReferenceStoreError)
    _not_executed(bench)


_OUTSIDE = (
    "../secret.safetensors",
    "/etc/hostname",
    "a/../../secret.safetensors",
    "x" * 5000,
    "\ud800",
)
_OUTSIDE += ("x\0y", ".", "..", "", "loop", "link", "/dev/zero", "fifo", "folder")


def _paths(seed: int) -> Iterator[Case]:
    del seed
    for number, name in enumerate(_OUTSIDE):
        act = functools.partial(_index, name)
        yield Case(f"an index that names {name[:30]!r}, {number}", act)
    names = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
    names += ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
    for name in names:
        for target in ("../secret", "/dev/zero", "/etc/hostname"):
            act = functools.partial(_link, name, target)
            yield Case(f"{name} is a link to {target}", act)
    for name in ("-1", "1e3", "8.aside", "../8", "08x", "٣"):
        yield Case(
            f"a step of the name {name!r}", functools.partial(_step_name, name), own_process=True
        )


def _index(name: str, bench: Bench) -> None:
    folder = _checkpoint(bench.folder / "hf")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (bench.folder / "secret.safetensors").write_bytes(content)
    (folder / "a").mkdir()
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "link").symlink_to("../secret.safetensors")
    os.mkfifo(folder / "fifo")
    index = {"metadata": {}, "weight_map": dict.fromkeys(_tensors(), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _import(bench, folder)


def _link(name: str, target: str, bench: Bench) -> None:
    folder = _checkpoint(bench.folder / "hf")
    (bench.folder / "secret").write_text('{"secret": "7c1d"}')  # pragma: allowlist secret
    if name not in ("tokenizer.json", "config.json", "model.safetensors"):
        vocab: Mapping[str, Any] = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
        (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": vocab}))
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    status, text = calls.call("convert", [f"--from_hf={folder}", f"--to={bench.folder / 'run'}"])
    if status == 0:
        copies = [p for p in (bench.folder / "run").rglob(name) if p.is_file()]
        if copies:
            raise Silent(f"{name} was copied from outside of the checkpoint")
        return  # the file is not read at all
    if status != 2 or "error: " not in text:
        raise Unclear(f"status {status}: ...{text[-300:]}")


def _step_name(name: str, bench: Bench) -> None:
    """Puts a folder of an odd name beside the steps, which must not be read or deleted."""
    from etils import epath

    from launch.reliability import program
    from trainers.checkpoints import step_dir

    run = program.half_way(bench)
    folder = run / "checkpoints" / name
    folder.mkdir(exist_ok=True)
    (folder / "mine").write_text("x")
    steps = step_dir.complete_steps(epath.Path(run) / "checkpoints")
    if max(steps) != 8 or not (folder / "mine").exists():
        raise Silent(f"steps are {sorted(steps)}")


def _code(seed: int) -> Iterator[Case]:
    del seed
    for name in ("config.json", "tokenizer_config.json"):
        for key in ("auto_map", "custom_pipelines"):
            yield Case(f"{key} in {name}", functools.partial(_remote, name, key))
    for name in ("modeling_own.py", "tokenization_own.py", "conftest.py", "sitecustomize.py"):
        yield Case(f"{name} in the folder", functools.partial(_beside, name))
    for name in ("os.system", "own:model", "step_dir.remove", "jax.numpy.load", "builtins.eval"):
        yield Case(f"model.json calls {name}", functools.partial(_record, name), own_process=True)
    yield Case("config.gin beside a checkpoint calls a function", _gin_beside, own_process=True)


_PROGRAM = "import os; os.mkdir({!r})"


def _remote(name: str, key: str, bench: Bench) -> None:
    folder = _checkpoint(bench.folder / "hf")
    (folder / "own.py").write_text(_PROGRAM.format(str(bench.folder / "executed")))
    content = json.loads((folder / "config.json").read_text()) if name == "config.json" else {}
    content[key] = {"AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", None]}
    if name != "config.json":
        vocab: Mapping[str, Any] = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
        (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": vocab}))
    (folder / name).write_text(json.dumps(content))
    status, text = calls.call("convert", [f"--from_hf={folder}", f"--to={bench.folder / 'run'}"])
    if status not in (0, 2):
        raise Unclear(f"status {status}: ...{text[-300:]}")
    if status == 0 and key == "auto_map" and name == "config.json":
        raise Silent("a model with code of its own was imported")
    _not_executed(bench)


def _beside(name: str, bench: Bench) -> None:
    folder = _checkpoint(bench.folder / "hf")
    (folder / name).write_text(_PROGRAM.format(str(bench.folder / "executed")))
    status, text = calls.call("convert", [f"--from_hf={folder}", f"--to={bench.folder / 'run'}"])
    if status != 0:
        raise Unclear(f"status {status}: ...{text[-300:]}")
    _not_executed(bench)


def _record(name: str, bench: Bench) -> None:
    from launch.reliability import program

    run = program.half_way(bench)
    record = json.loads((run / "model.json").read_text())
    record["macros"]["MODEL"] = {"call": name}
    (run / "model.json").write_text(json.dumps(record))
    _score(bench, run, "model.json")


def _gin_beside(bench: Bench) -> None:
    from launch.reliability import program

    run = program.half_way(bench)
    (run / "model.json").unlink()
    path = bench.folder / "executed"
    text = (run / "config.gin").read_text() + "\nfrom trainers.checkpoints import step_dir\n"
    text += "config.TransformerConfig.sliding_window = @step_dir.write_file()\n"
    text += f"step_dir.write_file.path = '{path}'\nstep_dir.write_file.data = b'x'\n"
    (run / "config.gin").write_text(text)
    _score(bench, run)


def _score(bench: Bench, run: pathlib.Path, *words: str) -> None:
    rows = bench.folder / "rows.jsonl"
    rows.write_text('{"text": "hi"}\n')
    flags = [f"--checkpoint={run}", f"--inputs={rows}", f"--output={bench.folder / 'out.jsonl'}"]
    calls.refused("score", flags, *words)
    _not_executed(bench)


_DOUBLE = (
    "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(40) %}{% set n.x = EXPR %}{% endfor %}"
)
_TEMPLATES: dict[str, str] = {
    "loops in loops": "{% for i in [1] * 10000000 %}{% for j in [1] * 10000000 %}{% endfor %}{% endfor %}",
    "a macro that calls itself": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a power": "{{ 9 ** 99999999999 }}",
    "doubling by ~": _DOUBLE.replace("EXPR", "n.x ~ n.x"),
    "doubling by +": _DOUBLE.replace("EXPR", "n.x + n.x"),
    "doubling by join": _DOUBLE.replace("EXPR", "[n.x, n.x] | join"),
    "replace": _DOUBLE.replace("EXPR", "n.x.replace('a', 'aa')"),
    "a batch": "{{ [1] | batch(10**10, 'x') | list }}",
    "an indent": "{{ [1] | tojson(indent=2000000000) }}",
    "tabs": "{{ ('\t' * 9999).expandtabs(10**9) }}",
    "a range": "{{ range(10**9) | list }}",
    "brackets": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "too long": "{{ 1 }}" * 3_000_000,
    "a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "an import": "{% import 'os' as os %}{{ os.popen('id').read() }}",
    "an include": "{% include '/etc/passwd' %}",
    "a format string": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "a cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "an attribute filter": "{{ messages | attr('__class__') | attr('__base__') }}",
    "a name that is not there": "{{ nothing.at.all }}",
    "an open block": "{% for m in messages %}",
    "an error of its own": "{{ raise_exception('x' * 10) }}",
}


def _templates(seed: int) -> Iterator[Case]:
    del seed
    for name, source in _TEMPLATES.items():
        yield Case(name, functools.partial(_template, source))


def _nothing() -> str:
    from data.tokenizers.chat_template import ChatTemplateError

    raise ChatTemplateError("chat template: it renders nothing")


def _template(source: str, bench: Bench) -> None:
    from data.tokenizers.chat_template import ChatTemplate, ChatTemplateError

    del bench
    messages = [{"role": "user", "content": "hi"}]
    template = ChatTemplate({"default": source})
    # An attribute that is refused may also be undefined, which renders as nothing.
    error = refused(lambda: template.render(messages) or _nothing(), ChatTemplateError)
    if len(str(error)) > 1000:
        raise Unclear(f"an error of {len(str(error))} characters")


ROWS = (
    Row(14, "Hugging Face configs that lie", "refused, nothing is left", _lies, sample=4),
    Row(
        15,
        "safetensors and GGUF files: fuzzed, huge, overlapping",
        "read, or one error with the file's name; no crash, little memory",
        _weights,
        sample=4,
    ),
    Row(16, "pickles in the place of weights and settings", "never executed", _pickles, sample=2),
    Row(
        17,
        "paths that leave a checkpoint, links, devices, odd names",
        "refused or not read",
        _paths,
        sample=3,
    ),
    Row(18, "code in a checkpoint", "never executed; refused where it is needed", _code, sample=2),
    Row(
        19,
        "chat templates that escape, loop, grow or are wrong",
        "one error within the limits of time and memory",
        _templates,
        sample=3,
    ),
)
