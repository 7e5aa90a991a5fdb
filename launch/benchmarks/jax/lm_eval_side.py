"""One side of the benchmark of lm-evaluation-harness; the peer's runs under .venv-lm-eval.

  python -m launch.benchmarks.jax.lm_eval_side FOLDER ours 0
  .venv-lm-eval/bin/python -P launch/benchmarks/jax/lm_eval_side.py FOLDER peer BATCH_SIZE

Reads what lm_eval.py wrote to FOLDER; prints seconds and answers of each kind of request as JSON. The
project is imported on its own side alone.
"""

import copy
import importlib.metadata
import json
import os
import pathlib
import sys
import time


def main(folder: str, side: str, batch_size: int) -> None:
    if side == "ours":
        from launch import environment

        environment.restart_with_huge_pages()
        environment.prepare()
        from launch.evaluation.lm_eval.model import EspalierLM

        model = EspalierLM(os.path.join(folder, "run"), batch_size=batch_size or "auto")
    else:
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        import torch
        from lm_eval.models.huggingface import HFLM

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        model = HFLM(os.path.join(folder, "model"), device="cpu", batch_size=batch_size)
    from lm_eval.api.instance import Instance

    given = json.loads(pathlib.Path(folder, "requests.json").read_bytes())
    kinds = {"multiple_choice": "loglikelihood", "generate_until": "generate_until"}
    report = {"versions": _versions()}
    for kind, method in kinds.items():
        seconds = []
        # The peer has nothing to compile: its second time would be its first.
        for _ in range(2 if side == "ours" else 1):
            requests = [
                Instance(
                    request_type=method, doc={}, arguments=tuple(copy.deepcopy(arguments)), idx=i
                )
                for i, arguments in enumerate(given[kind])
            ]
            began = time.perf_counter()
            answers = getattr(model, method)(requests, disable_tqdm=True)
            seconds.append(time.perf_counter() - began)
        report[kind] = {"seconds": seconds[0], "again": seconds[-1], "answers": answers}
    print(json.dumps(report), flush=True)


def _versions() -> dict[str, str]:
    found = {}
    for name in ("lm_eval", "torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
