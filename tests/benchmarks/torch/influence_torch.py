"""kronfluence's and bergson's sides of the benchmark `influence`; runs under .venv-peers, never imported by the project.

  .venv-peers/bin/python -P tests/benchmarks/torch/influence_torch.py kronfluence|bergson FOLDER

FOLDER is written by influence.py. It answers requests on standard input: fit, score and versions.
"""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import sys
import time
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import numpy as np
import torch
import transformers

KINDS = ("gate", "up", "down")


def versions(*names):
    return {name: importlib.metadata.version(name) for name in (*names, "torch", "transformers")}


class Kronfluence:
    def __init__(self, folder):
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task

        self.folder = folder
        self.case = json.loads(pathlib.Path(folder, "case.json").read_bytes())
        layers = range(self.case["num_layers"])

        class Sums(Task):
            def compute_train_loss(self, batch, model, sample=False):
                ids, weights = batch
                # The last token is a target alone, as on the other side.
                logits = model(input_ids=ids[:, :-1]).logits.float()
                log_probs = torch.log_softmax(logits, -1)
                picked = log_probs.gather(-1, ids[:, 1:, None])[..., 0]
                return -(picked * weights[:, 1:]).sum()

            def compute_measurement(self, batch, model):
                return self.compute_train_loss(batch, model)

            def get_influence_tracked_modules(self):
                return [f"model.layers.{i}.mlp.{kind}_proj" for i in layers for kind in KINDS]

            def get_attention_mask(self, batch):
                return None

        task = Sums()
        model = prepare_model(load(folder), task)
        self.analyzer = Analyzer(
            "bench",
            model,
            task,
            cpu=True,
            output_dir=os.path.join(folder, "kronfluence"),
            disable_tqdm=True,
            disable_model_save=True,
        )
        self.factor_arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
        self.score_arguments = ScoreArguments(damping_factor=None)
        self.documents = data_of(folder, "documents", 1)
        self.queries = data_of(folder, "queries", self.case["prompt"])

    def fit(self):
        began = time.perf_counter()
        self.analyzer.fit_all_factors(
            "factors",
            self.documents,
            per_device_batch_size=self.case["batch_size"],
            factor_args=self.factor_arguments,
            overwrite_output_dir=True,
        )
        return {"seconds": time.perf_counter() - began}

    def score(self):
        began = time.perf_counter()
        self.analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            self.queries,
            self.documents,
            per_device_query_batch_size=self.case["queries"],
            per_device_train_batch_size=self.case["batch_size"],
            score_args=self.score_arguments,
            overwrite_output_dir=True,
        )
        scores = self.analyzer.load_pairwise_scores("scores")["all_modules"]
        seconds = time.perf_counter() - began
        np.save(os.path.join(self.folder, "kronfluence.npy"), scores.numpy().T)
        return {"seconds": seconds}

    def versions(self):
        return versions("kronfluence")


class Bergson:
    def __init__(self, folder):
        self.folder = folder
        self.case = json.loads(pathlib.Path(folder, "case.json").read_bytes())
        self.root = os.path.join(folder, "bergson")

    def index(self, name, data):
        from bergson.config.config import DataConfig, DistributedConfig, IndexConfig

        tokens = self.case["batch_size"] * self.case["tokens"]
        return IndexConfig(
            run_path=os.path.join(self.root, name),
            model=os.path.join(self.folder, "model"),
            data=DataConfig(dataset=os.path.join(self.folder, f"{data}.jsonl")),
            distributed=DistributedConfig(nproc_per_node=1),
            filter_modules="*.self_attn.*",
            token_batch_size=tokens,
            overwrite=True,
        )

    def fit(self):
        from bergson.config.config import HessianConfig
        from bergson.hessians.hessian_approximations import approximate_hessians

        shutil.rmtree(self.root, ignore_errors=True)
        began = time.perf_counter()
        settings = HessianConfig(method="kfac", ev_correction=True, use_dataset_labels=True)
        approximate_hessians(self.index("factors", "documents"), settings)
        return {"seconds": time.perf_counter() - began}

    def score(self):
        from bergson.build import build_query
        from bergson.config.config import (
            InversionConfig,
            PreprocessConfig,
            QuerySetConfig,
            ScoreConfig,
        )
        from bergson.distributed import launch_distributed_run
        from bergson.hessians.apply_hessian import EkfacConfig, apply_worker
        from bergson.score.score import score_dataset

        for name in ("query", "transformed", "scores"):
            shutil.rmtree(os.path.join(self.root, name), ignore_errors=True)
        began = time.perf_counter()
        query = self.index("query", "queries")
        build_query(query, QuerySetConfig(dataset=query.data.dataset), PreprocessConfig())
        transformed = os.path.join(self.root, "transformed")
        apply = EkfacConfig(
            hessian_method_path=os.path.join(self.root, "factors"),
            gradient_path=query.run_path,
            run_path=transformed,
            ev_correction=True,
            apply_batch_size=self.case["queries"],
        )
        inversion = InversionConfig(damping_factor=self.case["damping"])
        launch_distributed_run("apply", apply_worker, [apply, inversion], query.distributed)
        index = self.index("scores", "documents")
        score_dataset(index, ScoreConfig(query_path=transformed), PreprocessConfig())
        seconds = time.perf_counter() - began
        np.save(os.path.join(self.folder, "bergson.npy"), self.read(index.run_path))
        return {"seconds": seconds}

    def read(self, run_path):
        """Returns scores [documents, queries]."""
        from bergson.data import load_scores

        return np.asarray(load_scores(pathlib.Path(run_path))[:])

    def versions(self):
        return versions("bergson")


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        os.path.join(folder, "model"),
        dtype=torch.float32,
        attn_implementation="sdpa",
        use_cache=False,
    )


def data_of(folder, name, prompt):
    ids = torch.from_numpy(np.load(os.path.join(folder, f"{name}.npy"))).long()
    weights = torch.ones(ids.shape)
    weights[:, :prompt] = 0
    return torch.utils.data.TensorDataset(ids, weights)


def main(side, folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        peer = {"kronfluence": Kronfluence, "bergson": Bergson}[side](folder)
        for line in sys.stdin:
            request = json.loads(line)
            print(json.dumps(getattr(peer, request.pop("op"))(**request)), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
