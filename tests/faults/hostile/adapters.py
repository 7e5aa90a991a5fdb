"""The row about directories of peft whose settings or tensors are wrong, or of a method that changes the base model."""

import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from tests.faults import calls
from tests.faults.hostile import checkpoint
from tests.faults.table import Bench, Case, Row, Silent, Unclear

_CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
_NOT_NUMBERS = ("8", "", True, [8], {"a": 8}, float("nan"), float("inf"), -1, 10**400)
# Values of fields, each of which is refused, or means the same as a field that is absent.
_SETTINGS: dict[str, tuple[Any, ...]] = {
    "r": (*_NOT_NUMBERS, 0, 1.5, 7, 10**9),
    "lora_alpha": (*_NOT_NUMBERS, 0),
    "lora_dropout": (*_NOT_NUMBERS, 1, 1.5),
    "use_rslora": ("no", "true", 1, [True], {"a": True}),
    "use_dora": (True, "true", 1, [True]),
    "rank_pattern": ([], [4], "q_proj", {"(": 4}, {"q_proj": "4"}, {"q_proj": 0}, {"(a+)+!": 4}),
    "alpha_pattern": ([16], "q_proj", {"[": 16}, {"q_proj": None}, {r"((\w|[.])+)+!": 16}),
    "init_lora_weights": ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "PiSSA")
    + ("nothing", 3, [], {"a": 1}, "gaussian", "eva", "orthogonal", False, None),
    "bias": ("all", "lora_only", 3, ["all"], "none", None),
    "modules_to_save": (["lm_head"], "lm_head", {"a": 1}, [], None),
    "peft_type": ("VERA", "lora", "", None, 3, ["LORA"], {"a": 1}),
    "layer_replication": ([[0, 1]], "all", None),
    "lora_bias": (True, "yes", False),
    "trainable_token_indices": ([1], {"a": [1]}, None),
    "target_parameters": (["weight"], "weight", None),
    "velora_config": ({"rank": 1}, "x", None),
    "a_field_of_tomorrow": (1, "x", [1], {"a": 1}, True, None),
}
Tensors = dict[str, np.ndarray]


def _tensors() -> Tensors:
    """Returns LoRA of rank 4 for two projections of each layer of `checkpoint.write`."""
    random_ = np.random.default_rng(0)
    sides = {"self_attn.q_proj": (8, 8), "mlp.down_proj": (12, 8)}
    return {
        f"base_model.model.model.layers.{i}.{module}.lora_{side}.weight": random_.normal(
            size=(4, columns) if side == "A" else (rows, 4)
        ).astype(np.float32)
        for i in range(2)
        for module, (columns, rows) in sides.items()
        for side in "AB"
    }


def _spoilt(value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: np.where(np.arange(x.size).reshape(x.shape) == x.size // 2, value, x)


# What becomes of one tensor; a list of pairs replaces it.
_DAMAGE: dict[str, Callable[[str, np.ndarray], Mapping[str, np.ndarray]]] = {
    "missing": lambda name, x: {},
    "transposed": lambda name, x: {name: x.T.copy()},
    "of one dimension": lambda name, x: {name: x.ravel()},
    "of three dimensions": lambda name, x: {name: x[None]},
    "empty": lambda name, x: {name: x[:0]},
    "of integers": lambda name, x: {name: np.ones(x.shape, np.int32)},
    "with NaN": lambda name, x: {name: _spoilt(np.nan)(x)},
    "with infinity": lambda name, x: {name: _spoilt(-np.inf)(x)},
    "one row too long": lambda name, x: {name: np.pad(x, ((0, 1), (0, 0)))},
    "one column too long": lambda name, x: {name: np.pad(x, ((0, 0), (0, 1)))},
    "twice": lambda name, x: {name: x, name.replace(".weight", ".default.weight"): x + 1},
    "of another layer": lambda name, x: {name.replace("layers.", "layers.9"): x},
    "of another module": lambda name, x: {name.replace("_proj", "_project"): x},
    "without a side": lambda name, x: {name.replace("lora_", ""): x},
    "with a magnitude": lambda name, x: {
        name: x,
        name.rpartition("lora_")[0] + "lora_magnitude_vector": np.ones(3, np.float32),
    },
    "of (IA)3": lambda name, x: {name.rpartition("lora_")[0] + "ia3_l": x},
}


def _cases(seed: int) -> Iterator[Case]:
    del seed
    for field, values in _SETTINGS.items():
        yield Case(f"values of {field}", functools.partial(_settings, field, values))
    for damage in _DAMAGE:
        yield Case(f"a tensor {damage}", functools.partial(_damaged, damage))


def _write(folder: pathlib.Path, config: Any, tensors: Tensors) -> pathlib.Path:
    import safetensors.numpy

    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def _base(bench: Bench) -> pathlib.Path:
    """Returns a run of the base model."""
    flags = [f"--from_hf={checkpoint.write(bench.folder / 'hf')}", f"--to={bench.folder / 'base'}"]
    status, text = calls.call("convert", flags)
    if status:
        raise Unclear(f"the base model is not imported: {text[-300:]}")
    return bench.folder / "base"


def _imported(bench: Bench, folder: pathlib.Path, name: str) -> dict[str, Any] | None:
    """Returns the arrays of an import by name, or None if it was refused by one error that names a file of peft."""
    target = bench.folder / name
    flags = [f"--from_peft={folder}", f"--base={bench.folder / 'base'}", f"--to={target}"]
    status, text = calls.call("convert", flags)
    if status == 0:
        from espalier.trainers.checkpoints import step_dir

        entries = step_dir.read_manifest(step_dir.resolve(target)).arrays
        return {path: entry for path, entry in entries.items() if "adapter_" in path}
    message = text[text.rindex("error: ") :] if "error: " in text else ""
    if status != 2 or not 0 < len(message) < 2000 or str(folder) not in message:
        raise Unclear(f"{name}: status {status}: ...{text[-400:]}")
    if target.exists():
        raise Unclear(f"{name}: a refused import has left a run")
    return None


def _settings(field: str, values: tuple[Any, ...], bench: Bench) -> int:
    _base(bench)
    plain = _imported(bench, _write(bench.folder / "plain", _CONFIG, _tensors()), "run_plain")
    for number, value in enumerate(values):
        folder = _write(bench.folder / f"{number}", {**_CONFIG, field: value}, _tensors())
        imported = _imported(bench, folder, f"run_{number}")
        # peft's default of an absent alpha or rank is another number than this adapter's.
        if imported is not None and imported != plain:
            raise Silent(f"{field} = {value!r:.100} is accepted, and changes the adapter")
    return len(values)


def _damaged(damage: str, bench: Bench) -> int:
    _base(bench)
    tensors = _tensors()
    for number, name in enumerate(tensors):
        rest = {other: x for other, x in tensors.items() if other != name}
        changed = {**rest, **_DAMAGE[damage](name, tensors[name])}
        changed = {key: np.ascontiguousarray(x) for key, x in changed.items()}
        folder = _write(bench.folder / f"{number}", _CONFIG, changed)
        if _imported(bench, folder, f"run_{number}") is not None:
            raise Silent(f"{name} {damage} is accepted")
    return len(tensors)


ROWS = (
    Row(
        29,
        "adapters of peft: every field and tensor wrong, methods that change the base model",
        "refused by the name of the file, or the same adapter as without the field; nothing is left",
        _cases,
        sample=3,
    ),
)
