"""One side of the benchmark of lm-evaluation-harness; the peer's side runs under .venv-lm-eval.

  .venv-lm-eval/bin/python -P tests/benchmarks/jax/lm_eval_side.py FOLDER REQUESTS BATCH_SIZE

Reads FOLDER and the requests of FOLDER/REQUESTS.json, written by lm_eval.py. Only this project's own side imports the project.
"""

import copy
import importlib.metadata
import json
import os
import pathlib
import sys
import time


def side(folder: str, requests: str, peer_batch_size: str | None = None) -> dict:
    """Returns seconds and answers of each kind of request; without a batch size, of this project."""
    if peer_batch_size is None:
        from espalier.launch.lm_eval.model import EspalierLM

        model = EspalierLM(os.path.join(folder, "run"), batch_size="auto")
    else:
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        import torch
        from lm_eval.models.huggingface import HFLM

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        model = HFLM(os.path.join(folder, "model"), device="cpu", batch_size=int(peer_batch_size))
    from lm_eval.api.instance import Instance

    arguments_by_kind = json.loads(pathlib.Path(folder, f"{requests}.json").read_bytes())
    methods = {"multiple_choice": "loglikelihood", "generate_until": "generate_until"}
    report = {"versions": _versions()}
    for kind, of_kind in arguments_by_kind.items():
        method = methods[kind]
        seconds = []
        # The peer does not compile, so a second call would take as long as the first.
        for _ in range(2 if peer_batch_size is None else 1):
            instances = [
                Instance(
                    request_type=method, doc={}, arguments=tuple(copy.deepcopy(arguments)), idx=i
                )
                for i, arguments in enumerate(of_kind)
            ]
            began = time.perf_counter()
            answers = getattr(model, method)(instances, disable_tqdm=True)
            seconds.append(time.perf_counter() - began)
        report[kind] = {"seconds": seconds[0], "again": seconds[-1], "answers": answers}
    return report


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("lm_eval", "torch", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


if __name__ == "__main__":
    print(json.dumps(side(*sys.argv[1:])), flush=True)
