"""Writes kronfluence.npz: every entry of kronfluence's factors and scores for a tiny transformer, with the data's own labels.

  .venv-peers/bin/python tests/trainers/influence/goldens/make_kronfluence.py

Made with torch 2.13 and kronfluence 1.0.1, in float64. Rows are padded, the last position of a row predicts nothing, and MLPs have
biases. The weights are stored under this project's names, with kernels [in, out].
"""

import pathlib
import tempfile

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import nn

V, D, F, L, N, T, Q = 13, 6, 5, 2, 7, 8, 3
F64 = torch.float64


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(D))

    def forward(self, x):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * self.scale


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("query", "key", "value", "out"):
            setattr(self, name, nn.Linear(D, D, bias=False))

    def forward(self, x, mask):
        logits = self.query(x) @ self.key(x).transpose(-1, -2) / D**0.5
        seen = torch.tril(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool))
        seen = seen & mask[:, None, :]
        weights = torch.softmax(logits.masked_fill(~seen, -1e30), -1) * mask[:, :, None]
        return self.out(weights @ self.value(x))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, F), nn.Linear(D, F), nn.Linear(F, D)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp_norm, self.attention, self.mlp = Norm(), Norm(), Attention(), Mlp()

    def forward(self, x, mask):
        x = x + self.attention(self.norm(x), mask)
        return x + self.mlp(self.mlp_norm(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(V, D))
        self.layers, self.final_norm = nn.ModuleList(Layer() for _ in range(L)), Norm()

    def forward(self, ids, mask):
        x = self.embedding[ids]
        for layer in self.layers:
            x = layer(x, mask)
        return self.final_norm(x) @ self.embedding.T


def loss(model, batch):
    ids, mask, weights = batch
    log_probs = torch.log_softmax(model(ids, mask), -1)[:, :-1]
    picked = log_probs.gather(-1, ids[:, 1:, None])[..., 0]
    return -(picked * weights[:, 1:]).sum()


class Sums(Task):
    def compute_train_loss(self, batch, model, sample=False):
        assert not sample
        return loss(model, batch)

    def compute_measurement(self, batch, model):
        return loss(model, batch)

    def get_influence_tracked_modules(self):
        names = [f"attention.{n}" for n in ("query", "key", "value", "out")]
        names += [f"mlp.{n}" for n in ("gate", "up", "down")]
        return [f"layers.{i}.{name}" for i in range(L) for name in names]

    def get_attention_mask(self, batch):
        return batch[1].long()


def rows(r, count, prompt):
    ids = r.integers(0, V, (count, T))
    lengths = r.integers(4, T + 1, count)
    mask = np.arange(T)[None] < lengths[:, None]
    weights = (mask & (np.arange(T)[None] >= prompt)).astype(np.float64)
    return ids, mask, weights


def main():
    torch.manual_seed(0)
    r = np.random.default_rng(0)
    model = Model().to(F64)
    for parameter in model.parameters():
        parameter.data = torch.as_tensor(r.normal(size=parameter.shape) * 0.5)
    out = {}
    for name, value in model.named_parameters():
        value = value.detach().numpy().copy()
        out[f"params/{name}"] = value.T if name.endswith("weight") else value
    data = {"train": rows(r, N, 1), "query": rows(r, Q, 3)}
    for split, (ids, mask, weights) in data.items():
        out |= {f"{split}/ids": ids, f"{split}/mask": mask, f"{split}/weights": weights}
    sets = {
        split: torch.utils.data.TensorDataset(*map(torch.as_tensor, arrays))
        for split, arrays in data.items()
    }
    task = Sums()
    model = prepare_model(model, task)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("golden", model, task, cpu=True, output_dir=folder, disable_tqdm=True)
        dtypes = dict.fromkeys(
            (
                *("activation_covariance_dtype", "gradient_covariance_dtype", "lambda_dtype"),
                *("per_sample_gradient_dtype", "eigendecomposition_dtype"),
            ),
            F64,
        )
        for strategy in ("ekfac", "kfac", "identity"):
            analyzer.fit_all_factors(
                strategy,
                sets["train"],
                per_device_batch_size=3,
                factor_args=FactorArguments(strategy=strategy, use_empirical_fisher=True, **dtypes),
            )
            for label, damping in (("heuristic", None), ("absolute", 1e-2)):
                name = f"{strategy}_{label}"
                analyzer.compute_pairwise_scores(
                    name,
                    strategy,
                    sets["query"],
                    sets["train"],
                    per_device_query_batch_size=Q,
                    per_device_train_batch_size=4,
                    score_args=ScoreArguments(
                        damping_factor=damping,
                        score_dtype=F64,
                        per_sample_gradient_dtype=F64,
                        precondition_dtype=F64,
                        compute_per_module_scores=True,
                    ),
                )
                scores = analyzer.load_pairwise_scores(name)
                for module, values in scores.items():
                    out[f"{module}/scores/{name}"] = values.numpy().T  # [documents, queries]
                out[f"scores/{name}"] = sum(scores.values()).numpy().T
        covariances = analyzer.load_covariance_matrices("ekfac")
        lambdas = analyzer.load_lambda_matrices("ekfac")
        eigen = analyzer.load_eigendecomposition("ekfac")
        for module in task.get_influence_tracked_modules():
            a = covariances["activation_covariance"][module].numpy()
            s = covariances["gradient_covariance"][module].numpy()
            count = int(covariances["num_activation_covariance_processed"][module])
            out |= {f"{module}/a": a / count, f"{module}/s": s / count}
            rows_ = int(lambdas["num_lambda_processed"][module])
            # [outputs, inputs]; eigenvalues ascend, and differ, so that their order is not free.
            out[f"{module}/lambda"] = lambdas["lambda_matrix"][module].numpy() / rows_
            for side, kind in (("a", "activation"), ("s", "gradient")):
                for letter, what in (("l", "eigenvalues"), ("q", "eigenvectors")):
                    out[f"{module}/{letter}{side}"] = eigen[f"{kind}_{what}"][module].numpy()
    np.savez_compressed(pathlib.Path(__file__).with_name("kronfluence.npz"), **out)


if __name__ == "__main__":
    main()
