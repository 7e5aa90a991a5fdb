"""Training, DPO, decoding, attention and experts on the GPU or TPU of this machine: MFU, and ratios to torch there.

Training steps of 1B and 8B shapes and of a Mixtral, with as many layers as the device's memory allows; a step of DPO;
greedy decoding with the whole cache and with SnapKV; attention and the products of experts, forward and backward. All
compute in bfloat16. Fresh processes alternate with transformers and torch on the same GPU, if the environment of
`make peers` has torch with CUDA. Weights are random on both sides, because the time of a step does not depend on them.
--tiny runs the same programs on a CPU.
"""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from tests.benchmarks import accelerator_case, case, compare

Reports = Mapping[str, list[dict[str, Any]]]
# The peer's modes by kind of workload; the fastest one of a pair counts.
_MODES = {
    "train": ("eager", "compiled"),
    "dpo": ("eager", "compiled"),
    "decode": ("dynamic", "static"),
    "attention": ("sdpa",),
    "experts": (),  # the peer's experts are part of its training step
}
_SCRIPT = "torch/accelerator_torch.py"


def run(*, tiny: bool = False, rounds: int = 3, steps: int = 10) -> dict[str, Any]:
    """Runs every workload `rounds` times on each side, `steps` timed steps in each; a workload that fails has its error.

    Raises:
      PeerError: JAX has no GPU or TPU, and the sizes are not tiny.
    """
    if tiny:
        rounds, steps = 1, 1
    workloads = accelerator_case.workloads(tiny=tiny)
    ours = compare.measured(_ours("describe", workloads))
    if ours["platform"] == "cpu" and not tiny:
        raise compare.PeerError(
            "The benchmark accelerator needs a GPU or a TPU, and JAX has only a CPU here: install the extra 'cuda' or 'tpu' and "
            "check JAX_PLATFORMS, or try the benchmark with --tiny."
        )
    peer = _peer(ours["platform"])
    results = {}
    for number, (name, work) in enumerate(workloads.items(), 1):
        print(f"{name} ({number} of {len(workloads)}) ...", file=sys.stderr, flush=True)
        work = {**work, "steps": steps}
        if name in ours["layers"]:
            work = accelerator_case.with_layers(work, ours["layers"][name])
        results[name] = _result(work, rounds, ours["peak_flops"], has_peer="missing" not in peer)
        if name in ours["layers"]:
            results[name]["layers_of_the_whole_model"] = workloads[name]["model"]["num_layers"]
    facts = {key: ours[key] for key in ("platform", "device", "memory_bytes", "peak_flops")}
    return {"tiny": tiny, **facts, "peer": peer, "workloads": results}


def _ours(what: str, argument: Any) -> list[str]:
    return compare.ours("jax.accelerator_jax", what, json.dumps(argument))


def _peer(platform: str) -> dict[str, Any]:
    """Returns facts about the peer; 'missing' is the reason if it cannot be measured here."""
    try:
        facts = compare.measured(compare.peer(_SCRIPT, "describe", "{}"))
    except compare.PeerError as error:
        return {"missing": str(error).splitlines()[0]}
    if platform == "tpu" or (platform != "cpu" and not facts["cuda"]):
        return {**facts, "missing": f"torch has no device of the platform {platform!r}"}
    return facts


def _result(
    work: dict[str, Any], rounds: int, peak: float | None, *, has_peer: bool
) -> dict[str, Any]:
    try:
        commands = {"ours": _ours("measure", work)}
        for mode in _MODES[work["kind"]] if has_peer else ():
            argument = json.dumps({**work, "mode": mode, "config": _config(work)})
            commands[mode] = compare.peer(_SCRIPT, "measure", argument)
        reports = compare.alternate_processes(commands, rounds)
    except compare.PeerError as error:
        return {"case": work, "error": str(error)}
    figures: dict[str, Callable[..., dict[str, Any]]] = {
        "train": _training,
        "dpo": _training,
        "decode": _decoding,
        "attention": _kernels,
        "experts": _kernels,
    }
    return {"case": work, **figures[work["kind"]](reports, peak)}


def _config(work: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the peer's config.json of a workload's model."""
    if "model" not in work:
        return None
    sizes = work["model"]
    mixture: dict[str, Any] = {}
    if "num_experts" in sizes:
        mixture = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
        mixture |= {"num_local_experts": sizes["num_experts"], "sliding_window": None}
        mixture["num_experts_per_tok"] = sizes["top_k"]
    length = work["length"] + work.get("new", 0)
    return case.hf_config(
        sizes, tie_word_embeddings=sizes["tied"], max_position_embeddings=length, **mixture
    )


def _training(reports: Reports, peak: float | None) -> dict[str, Any]:
    """Returns figures of steps: model FLOPs exclude those of recomputed layers."""
    seconds, ours = compare.each(reports, "seconds"), reports["ours"]
    memory = compare.each(reports, "peak_memory_mb")
    return {
        "mfu": [_utilisation(one["flops"], one["seconds"], peak) for one in ours],
        "tokens_per_second": {
            name: [round(ours[0]["tokens"] / s) for s in values] for name, values in seconds.items()
        },
        "seconds_per_step": seconds,
        "parameters": ours[0]["parameters"],
        "peak_memory_mb": {name: values[0] for name, values in memory.items()},
        **_over_best_peer(seconds),
    }


def _decoding(reports: Reports, peak: float | None) -> dict[str, Any]:
    del peak  # decoding is bound by memory
    ours = reports["ours"]
    caches = {name: [one[name]["seconds"] for one in ours] for name in ("full", "snapkv")}
    peers = {name: [one["seconds"] for one in of] for name, of in reports.items() if name != "ours"}
    return {
        "ms_per_token": {k: [s * 1e3 for s in v] for k, v in (caches | peers).items()},
        "snapkv_speed_over_full": compare.ratio(caches["full"], caches["snapkv"]),
        "prefill_seconds": {k: [one[k]["prefill_seconds"] for one in ours] for k in caches},
        "cache_bytes": {name: ours[0][name]["cache_bytes"] for name in caches},
        **_over_best_peer({"ours": caches["full"], **peers}),
    }


def _kernels(reports: Reports, peak: float | None) -> dict[str, Any]:
    result = {}
    kernels = [name for name, one in reports["ours"][0].items() if isinstance(one, Mapping)]
    for name in kernels:  # the rest is of the process
        sides = [side for side, of in reports.items() if name in of[0]]
        seconds = {side: [one[name]["seconds"] for one in reports[side]] for side in sides}
        flops = reports["ours"][0][name]["flops"]
        result[name] = {
            "teraflops_per_second": [flops / s / 1e12 for s in seconds["ours"]],
            "of_peak": [_utilisation(flops, s, peak) for s in seconds["ours"]],
            "seconds": seconds,
            **_over_best_peer(seconds),
        }
    return dict(sorted(result.items()))


def _over_best_peer(seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    peers = [values for name, values in seconds.items() if name != "ours"]
    if not peers:
        return {}
    best = [min(of_round) for of_round in zip(*peers, strict=True)]
    return {"speed_over_best_peer": compare.ratio(best, seconds["ours"])}


def _utilisation(flops: float, seconds: float, peak: float | None) -> float | None:
    return None if peak is None else flops / seconds / peak
