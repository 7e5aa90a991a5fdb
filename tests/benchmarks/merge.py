"""Merging bfloat16 checkpoints of 0.5B parameters against mergekit: processor time, wall time and peak memory.

Both sides run their usual command in fresh processes, which alternate, on the same folders and with the same configuration:
the mean of two models, SLERP, and TIES of two models and their base. The shape is Cohere's with 256,000 tokens, so the
embedding is half of the model; it has norms of queries and keys, which mergekit needs. At the end the results are compared.
"""

import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

from tests.benchmarks import compare

CASE: dict[str, Any] = {
    "model_type": "cohere",
    "architectures": ["CohereForCausalLM"],
    "vocab_size": 256_000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "logit_scale": 0.0625,
    "hidden_act": "silu",
    "attention_bias": False,
    "use_qk_norm": True,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
_TINY = {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"models": [(1, {"weight": 1.0}), (2, {"weight": 0.5})]},
    "slerp": {"models": [(1, {}), (2, {})], "base": 1, "parameters": {"t": 0.4}},
    "ties": {
        "models": [(1, {"weight": 1.0}), (2, {"weight": 0.5})],
        "base": 0,
        "parameters": {"density": 0.5},
    },
}
_DRAWN = 1 << 24  # values that tables repeat
_SIDES = ("ours", "mergekit")


def run(*, rounds: int = 2, tiny: bool = False) -> dict[str, Any]:
    """Alternates both sides `rounds` times for each method."""
    results: dict[str, Any] = {}
    reports: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        size = sum(write_model(folder, i, tiny=tiny) for i in range(3))
        for method in METHODS:
            config = write_config(folder, method)
            of_method = {name: reports.setdefault(f"{name} {method}", []) for name in _SIDES}
            for i in range(rounds):
                for name in _SIDES[:: -1 if i % 2 else 1]:
                    out = os.path.join(folder, name)
                    shutil.rmtree(out, ignore_errors=True)
                    command = compare.ours("merge", *_command(name, config, out))
                    of_method[name].append(compare.measured(command))
            results[method] = _ratios(of_method) | {
                "share_beyond_one_ulp": beyond_one_ulp(*(os.path.join(folder, x) for x in _SIDES))
            }
    keys = ("cpu_s", "wall_s", "peak_mb", "other_load")
    return {
        "checkpoint_mb": size / 3e6,
        **results,
        "reports": {
            name: {key: [r[key] for r in rs] for key in keys} for name, rs in reports.items()
        },
        "contended": compare.contended(reports),
        "peer_versions": _peer_versions(),
    }


def _ratios(reports: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    def over(key: str, *, inverse: bool = False) -> dict[str, Any]:
        ours, theirs = ([report[key] for report in reports[name]] for name in _SIDES)
        return compare.ratio(ours, theirs) if inverse else compare.ratio(theirs, ours)

    return {
        "mergekit_cpu_over_ours": over("cpu_s"),
        "mergekit_wall_over_ours": over("wall_s"),
        "our_peak_of_mergekits": over("peak_mb", inverse=True),
    }


def side(*command: str) -> dict[str, Any]:
    """Runs a command and returns its processor time, wall time and peak memory."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise compare.PeerError(f"{' '.join(command)} failed:\n{errors[-2000:]}")
    return {
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "wall_s": time.perf_counter() - begin,
        "peak_mb": usage.ru_maxrss / 1e3,
    }


def _command(name: str, config: str, out: str) -> list[str]:
    if name == "ours":
        return [sys.executable, "-m", "espalier.launch.merge", f"--config={config}", f"--out={out}"]
    program = _peer_folder() / "bin" / "mergekit-yaml"
    if not program.exists():
        raise compare.PeerError(f"{program} is missing: run `make peers` first.")
    flags = ["--no-copy-tokenizer", "--no-write-model-card"]
    return [os.fspath(program), config, out, *flags]


def _peer_folder() -> pathlib.Path:
    return compare.ROOT / ".venv-peers"


def _peer_versions() -> dict[str, str]:
    code = "import importlib.metadata as m, json; print(json.dumps({x: m.version(x) for x in ('mergekit', 'torch')}))"
    python = os.fspath(_peer_folder() / "bin" / "python")
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, check=True).stdout)


def write_config(folder: str, method: str) -> str:
    """Writes the configuration of a method, and returns its path."""
    case = METHODS[method]
    models = [
        {"model": os.path.join(folder, f"model{i}"), "parameters": parameters}
        for i, parameters in case["models"]
    ]
    config = {"merge_method": method, "models": models, "parameters": case.get("parameters", {})}
    if "base" in case:
        config["base_model"] = os.path.join(folder, f"model{case['base']}")
    if method == "ties":
        # Deltas in float32, as both sides recommend.
        config |= {"dtype": "float32", "out_dtype": "bfloat16"}
    path = pathlib.Path(folder, f"{method}.yml")
    path.write_text(json.dumps(config))
    return os.fspath(path)


def write_model(folder: str, number: int, *, tiny: bool = False) -> int:
    """Writes model 0, the base, or a model that differs from it a little; returns the bytes of its weights."""
    import numpy as np

    from espalier.model.hf.plan import FLOATS
    from tests.benchmarks import case

    base = np.random.default_rng(0).normal(0, 0.02, _DRAWN).astype(np.float32)
    if number:
        base += np.random.default_rng(number).normal(0, 0.002, _DRAWN).astype(np.float32)
    draws = base.astype(FLOATS["bfloat16"])

    def rows(_: str, shape: tuple[int, ...]) -> Any:
        width = math.prod(shape[1:])
        count = min(shape[0], draws.size // width)
        return draws[: count * width].reshape(count, *shape[1:])

    return case.write_model(
        os.path.join(folder, f"model{number}"), {**CASE, **(_TINY if tiny else {})}, rows
    )


def beyond_one_ulp(ours: str, theirs: str) -> float:
    """Returns the share of values that differ by more than one unit in the last place of bfloat16.

    TIES keeps some of the deltas of equal size, of which deltas of bfloat16 have many, and each side keeps others.
    """
    import numpy as np

    from espalier.model.hf.files.safetensors_files import SafetensorsReader

    count = total = 0
    with SafetensorsReader(ours) as a, SafetensorsReader(theirs) as b:
        for name, info in a.tensors.items():
            rows = max(1, (1 << 22) // max(1, math.prod(info.shape[1:])))
            for first in range(0, info.shape[0], rows):
                shape = (min(rows, info.shape[0] - first), *info.shape[1:])
                pair = [np.empty(shape, info.dtype) for _ in range(2)]
                for reader, part in zip((a, b), pair, strict=True):
                    reader.read_into(name, first, part)
                x, y = (part.astype(np.float32) for part in pair)
                unit = np.spacing(np.maximum(np.abs(x), np.abs(y))) * 2**16
                count += int(np.count_nonzero(np.abs(x - y) > unit))
                total += x.size
    return count / total
