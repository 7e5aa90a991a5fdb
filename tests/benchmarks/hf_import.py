"""Time to load a bfloat16 checkpoint with the shapes of Llama 3.2 1B (2.5 GB), and to convert it to a run.

This project's `load` and transformers' `from_pretrained` alternate in fresh processes; the conversion runs alone. Both
sides read files that are in the page cache (warm) and files that are not (cold). At the end each side touches every page
of the weights, because weights that are only memory-mapped are not read yet: transformers maps files whose dtype is the
requested one, so a warm load copies nothing. Imports are not counted. `load` also transposes all kernels and stacks
them by layer.
"""

import math
import os
import pathlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tests.benchmarks import case, compare

_CONFIG = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
_TINY = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}


def run(*, rounds: int = 3, tiny: bool = False) -> dict[str, Any]:
    """Alternates both sides `rounds` times, cold and then warm; then converts `rounds` times."""
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "source")
        size = write_checkpoint(source, tiny=tiny)
        commands = {
            "ours": compare.ours("hf_import", "load", source),
            "transformers": compare.peer("torch/llama_torch.py", "load", source),
        }
        reports_by_case = cold_and_warm(commands, source, rounds)
        for i in range(rounds):
            target = os.path.join(folder, str(i))
            report = compare.measured(compare.ours("hf_import", "convert", source, target))
            reports_by_case.setdefault("convert", []).append(report)
    return {
        "checkpoint_mb": size / 1e6,
        **ratios(reports_by_case, "load_and_touch_s"),
        **{
            side: {key: [r[key] for r in reports] for key in reports[0] if key != "versions"}
            for side, reports in reports_by_case.items()
        },
        "contended": compare.contended(reports_by_case),
        "peer_versions": reports_by_case["transformers_warm"][0]["versions"],
    }


def cold_and_warm(
    commands: Mapping[str, list[str]],
    source: str,
    rounds: int,
    *,
    env: Mapping[str, str] | None = None,
) -> dict[str, list[compare.Report]]:
    """Alternates sides that read the folder `source`, each cold and then warm; returns reports by '<side>_<cache>'."""
    reports: dict[str, list[compare.Report]] = {}
    for _ in range(rounds):
        for name, command in commands.items():
            evict(source)
            for cache in ("cold", "warm"):
                report = compare.measured(command, env=env)
                reports.setdefault(f"{name}_{cache}", []).append(report)
    return reports


def ratios(reports: Mapping[str, Sequence[compare.Report]], key: str) -> dict[str, Any]:
    """Returns transformers' seconds over ours, cold and warm, and its peak memory over ours, of `cold_and_warm`."""

    def ratio(cache: str, key: str) -> dict[str, Any]:
        theirs, ours = (
            [report[key] for report in reports[f"{side}_{cache}"]]
            for side in ("transformers", "ours")
        )
        return compare.ratio(theirs, ours)

    return {
        "transformers_over_ours_seconds_cold": ratio("cold", key),
        "transformers_over_ours_seconds_warm": ratio("warm", key),
        "transformers_over_ours_peak": ratio("warm", "peak_mb"),
    }


def evict(folder: str) -> None:
    """Evicts the files of a folder from the page cache."""
    for path in pathlib.Path(folder).iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_checkpoint(folder: str, *, tiny: bool = False) -> int:
    """Writes the checkpoint, in two files, and returns the size of its weights."""
    import numpy as np

    from espalier.model.hf.plan import FLOATS

    bfloat16 = FLOATS["bfloat16"]
    draws = np.random.default_rng(0).normal(0, 0.02, 1 << 24).astype(bfloat16)

    def rows(_: str, shape: tuple[int, ...]) -> np.ndarray:
        width = math.prod(shape[1:])
        count = min(shape[0], draws.size // width)
        return draws[: count * width].reshape(count, *shape[1:])

    return case.write_model(
        folder, case.hf_config({}, **{**_CONFIG, **(_TINY if tiny else {})}), rows
    )


def side(action: str, *arguments: str) -> dict[str, Any]:
    """Loads or converts in this process."""
    import jax
    import numpy as np

    from espalier.launch.convert.exchange import import_hf
    from espalier.launch.submit.worker import peak_bytes
    from espalier.model.hf.load import load

    jax.device_put(np.zeros(1)).block_until_ready()  # The backend starts on first use.
    before, begin = peak_bytes(os.getpid()), time.perf_counter()
    report: dict[str, Any] = {}
    if action == "convert":
        import_hf(*arguments)
        report["seconds"] = time.perf_counter() - begin
    else:
        _, params = load(*arguments)
        arrays = jax.block_until_ready(jax.tree.leaves(params))
        report["load_s"] = time.perf_counter() - begin
        for array in arrays:
            np.asarray(array).reshape(-1).view(np.uint8)[::4096].sum()
        report["load_and_touch_s"] = time.perf_counter() - begin
        report["parameters"] = sum(array.size for array in arrays)
    peak = peak_bytes(os.getpid())
    return {**report, "peak_mb": peak / 1e6, "peak_over_start_mb": (peak - before) / 1e6}
