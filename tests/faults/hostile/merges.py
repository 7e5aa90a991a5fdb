"""The row about merges: models that are not numbers, doubled or of several dtypes, and configurations that mislead."""

import functools
import itertools
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.faults import calls
from tests.faults.hostile import checkpoint
from tests.faults.table import Bench, Case, Row, Silent, Unclear

_MODELS = ("a", "b", "c")
# YAML texts of a weight, which versions of YAML read as several numbers, or that are none.
_NUMBERS = ("010", "1:30", "0o17", "0x1F", "1_000", "+.inf", ".nan", "1e400", "yes", "~", "''")
_NUMBERS += ("2001-01-01", "!!python/object:os.system x", "*missing", "[1, [2]]", "{a: 1}", "-")
# Patterns of filters that take exponential or quadratic time by trying one way after the other, or are none.
_PATTERNS = (r"((\w|[.])+)+!", "(a+)+$", "(.*)*x", r"(\w+\.)*\w+!", "(.|.)*!", r"(?=(a+))\1+!")
_PATTERNS += ("(" * 5000, "(a{1,9}){1,9}{1,9}", "[", "*", "(?P<x>a)(?P=x)", "a" * 100_000)


def _write(folder: pathlib.Path, seed: int, dtype: Any = np.float32) -> pathlib.Path:
    """Writes a model near those of other seeds."""
    import safetensors.numpy

    checkpoint.write(folder)
    random_ = np.random.default_rng(seed)
    tensors = {
        name: (x + random_.normal(0, 0.1, x.shape)).astype(dtype)
        for name, x in checkpoint.tensors().items()
    }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def _document(bench: Bench, method: str) -> dict[str, Any]:
    """Returns a configuration of as many models as a method takes, which are written."""
    from espalier.model.transforms.merge_methods import METHODS

    known = METHODS[method]
    names = _MODELS[: 1 if method == "passthrough" else 3 if known.most != 1 else 2]
    for seed, name in enumerate(names):
        _write(bench.folder / name, seed)
    base = None if known.base == "config" else f"{bench.folder}/a"
    merged = names[1:] if base else names
    if method == "nuslerp":
        base, merged = None, names[:2]
    document: dict[str, Any] = {"merge_method": method}
    document["models"] = [{"model": f"{bench.folder}/{name}"} for name in merged]
    needed = {"slerp": {"t": 0.5}, "nearswap": {"t": 0.01}}.get(method, {})
    if "weight" in known.parameters:
        for entry in document["models"]:
            entry["parameters"] = {"weight": 0.5}
    return (
        document
        | ({"base_model": base} if base else {})
        | ({"parameters": needed} if needed else {})
    )


def _merge(bench: Bench, text: str, name: str) -> str | None:
    """Returns None if a configuration is merged, or the one error that refuses it."""
    file, out = bench.folder / f"{name}.yml", bench.folder / name
    file.write_text(text)
    status, printed = calls.call("merge", [f"--config={file}", f"--out={out}"])
    if status == 0:
        return None
    message = printed[printed.rindex("error: ") :] if "error: " in printed else ""
    if status != 2 or not 0 < len(message) < 5000 or out.exists():
        raise Unclear(f"{name}: status {status}, left {out.exists()}: ...{printed[-400:]}")
    return message


def _tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    import safetensors.numpy

    files = sorted(folder.glob("*.safetensors"))
    return {name: x for file in files for name, x in safetensors.numpy.load_file(file).items()}


def _cases(seed: int) -> Iterator[Case]:
    del seed
    from espalier.model.transforms.merge_methods import METHODS

    for method in METHODS:
        yield Case(
            f"{method} of values that are no numbers", functools.partial(_not_finite, method)
        )
        if METHODS[method].random:
            yield Case(f"{method} of models elsewhere", functools.partial(_elsewhere, method))
    for name, make in _NAMES.items():
        yield Case(f"one model twice: {name}", functools.partial(_twice, make))
    for number, text in enumerate(_NUMBERS):
        yield Case(f"the weight {text}, {number}", functools.partial(_number, text))
    for number, pattern in enumerate(_PATTERNS):
        yield Case(f"a filter {pattern[:20]}, {number}", functools.partial(_pattern, pattern), 60.0)
    for pair in itertools.permutations(("float32", "bfloat16", "float16"), 2):
        yield Case(f"runs in {pair[0]} and {pair[1]}", functools.partial(_dtypes, pair))
    yield Case("aliases of aliases", _aliases, 60.0)


def _not_finite(method: str, bench: Bench) -> int:
    import safetensors.numpy

    document, tried = _document(bench, method), 0
    if _merge(bench, json.dumps(document), "sound") is not None:
        raise Unclear(f"{method} of sound models is refused")
    models = sorted(
        {*(x["model"] for x in document["models"]), document.get("base_model", "")} - {""}
    )
    for model, value in itertools.product(models, (np.nan, np.inf, -np.inf)):
        file = pathlib.Path(model, "model.safetensors")
        before, tensors = file.read_bytes(), _tensors(pathlib.Path(model))
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name][3, 2] = value
        safetensors.numpy.save_file(tensors, file)
        message = _merge(bench, json.dumps(document), f"out_{tried}")
        if message is None:
            raise Silent(f"{value} in {model} is merged")
        if name not in message or model not in message:
            raise Unclear(f"the error names neither {name} nor {model}: {message[:300]}")
        file.write_bytes(before)
        tried += 1
    return tried


def _elsewhere(method: str, bench: Bench) -> int:
    """Merges copies of the models in another folder, and as relative paths: the same numbers."""
    text = json.dumps(_document(bench, method))
    copies = bench.folder / "copies"
    for name in _MODELS:
        shutil.copytree(bench.folder / name, copies / name)
    moved = text.replace(f'"{bench.folder}/', f'"{copies}/')
    texts = {"here": text, "there": moved, "slash": text.replace('/b"', '/b/"')}
    for name, one in texts.items():
        if (error := _merge(bench, one, name)) is not None:
            raise Unclear(f"{name} is refused: {error}")
    first = _tensors(bench.folder / "here")
    for name in ("there", "slash"):
        tensors = _tensors(bench.folder / name)
        if any(not np.array_equal(tensors[key], first[key]) for key in first):
            raise Silent(f"{name}: other numbers are drawn for the same models")
    return 2


def _link(folder: pathlib.Path) -> str:
    (folder / "link").symlink_to(folder / "a")
    return str(folder / "link")


_NAMES: dict[str, Callable[[pathlib.Path], str]] = {
    "the same path": lambda folder: str(folder / "a"),
    "a slash": lambda folder: f"{folder}/a/",
    "a dot": lambda folder: f"{folder}/./a",
    "through a parent": lambda folder: f"{folder}/b/../a",
    "a link": _link,
}


def _twice(make: Callable[[pathlib.Path], str], bench: Bench) -> None:
    for seed, name in enumerate("ab"):
        _write(bench.folder / name, seed)
    paths = [str(bench.folder / "a"), str(bench.folder / "b"), make(bench.folder)]
    entries = [{"model": path, "parameters": {"weight": 1}} for path in paths]
    if _merge(bench, json.dumps({"merge_method": "linear", "models": entries}), "out") is None:
        raise Silent(f"{paths[-1]} counts twice")


def _number(text: str, bench: Bench) -> None:
    for seed, name in enumerate("ab"):
        _write(bench.folder / name, seed)
    lines = ["merge_method: linear", "models:"]
    for name, weight in (("a", text), ("b", "1")):
        lines += [f"- model: {bench.folder}/{name}", "  parameters:", f"    weight: {weight}"]
    if _merge(bench, "\n".join(lines), "out") is None:
        raise Silent(f"the weight {text} is read as a number")


def _pattern(pattern: str, bench: Bench) -> None:
    """Either an error, or a merge in which nothing matches; never a hang."""
    for seed, name in enumerate("ab"):
        _write(bench.folder / name, seed)
    weight = [{"filter": pattern, "value": 100}, {"value": 1}]
    entries = [{"model": f"{bench.folder}/{x}", "parameters": {"weight": weight}} for x in "ab"]
    _merge(bench, json.dumps({"merge_method": "linear", "models": entries}), "out")


def _dtypes(pair: tuple[str, str], bench: Bench) -> None:
    """Merges runs in both orders: the same numbers for whoever reads them."""
    from espalier.launch.load.load import load

    for seed, (name, dtype) in enumerate(zip("ab", pair, strict=True)):
        folder = _write(bench.folder / f"hf_{name}", seed)
        flags = [f"--from_hf={folder}", f"--to={bench.folder / name}", f"--dtype={dtype}"]
        if (result := calls.call("convert", flags))[0]:
            raise Unclear(f"not imported: {result[1][-300:]}")
    read = []
    for order in ("ab", "ba"):
        entries = [{"model": f"{bench.folder}/{x}", "parameters": {"weight": 1}} for x in order]
        text = json.dumps({"merge_method": "linear", "models": entries})
        if (error := _merge(bench, text, f"out_{order}")) is not None:
            raise Unclear(error)
        params = load(bench.folder / f"out_{order}").params
        read.append(np.asarray(params["token_embed"]["embedding"], np.float64))
    if not np.array_equal(*read):
        raise Silent(f"the order of {pair} changes what is read")


def _aliases(bench: Bench) -> None:
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    for one, other in itertools.pairwise("abcdefghi"):
        lines.append(f"{other}: &{other} [{','.join([f'*{one}'] * 9)}]")
    text = "\n".join([*lines, "merge_method: linear", "models: *i"])
    if _merge(bench, text, "out") is None:
        raise Silent("a list of 9^9 entries is merged")


ROWS = (
    Row(
        21,
        "merges: NaN, one model under two names, several dtypes, misleading numbers and patterns",
        "refused by the name of model, tensor or setting; only models and seed decide the result",
        _cases,
        sample=4,
    ),
)
