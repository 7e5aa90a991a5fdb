"""Influence by EK-FAC against kronfluence and bergson: time of factors and of pairwise scores, and whether scores agree.

All sides have the same small Llama, documents of topics, and queries, and take the documents' own labels and damping of a
tenth of the mean eigenvalue, at the MLPs. They alternate in warm processes, each of which writes its factors to disk anew;
bergson also reads model and data anew for each of its steps. Linear datamodeling scores are over models that are
trained again on halves of the documents.
"""

import functools
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.benchmarks import case, compare

CASE: dict[str, Any] = {
    "num_layers": 4,
    "embed_dim": 128,
    "num_heads": 4,
    "mlp_dim": 352,
    "vocab_size": 1024,
    "tokens": 64,  # of a text
    "max_length": 4096,  # positions, and tokens of a batch at most
    "documents": 512,
    "queries": 16,
    "prompt": 16,  # tokens of a query that do not count
    "batch_size": 32,
    "damping": 0.1,  # of the mean eigenvalue
    "rank": 32,
    "halves": 16,
    "steps": 60,  # of training, and of training again on each half
    "learning_rate": 3e-3,
}
_TOPICS = 32
_STD = 0.08  # of the weights, so that logits are of unit size
_SIDES = ("ours", "kronfluence", "bergson")


def run(*, rounds: int = 5, sizes: Mapping[str, Any] = CASE) -> dict[str, Any]:
    """Alternates all sides `rounds` times after a round that warms them."""
    with tempfile.TemporaryDirectory() as folder:
        losses_SQ, halves_SN = write(folder, sizes)
        commands = {
            "ours": compare.ours("jax.influence_jax", folder),
            **{name: compare.peer("torch/influence_torch.py", name, folder) for name in _SIDES[1:]},
        }
        with (
            compare.side(commands["ours"]) as ours,
            compare.side(commands["kronfluence"]) as kronfluence,
            compare.side(commands["bergson"]) as bergson,
        ):
            sides = dict(zip(_SIDES, (ours, kronfluence, bergson), strict=True))
            calls = {
                (name, op): functools.partial(one.ask, op)
                for name, one in sides.items()
                for op in ("fit", "score")
            }
            timed = compare.each(compare.alternate(calls, rounds, warm_up=1), "seconds")
            low_rank = ours.ask("score", rank=sizes["rank"])
            versions = {name: sides[name].ask("versions") for name in _SIDES[1:]}
        scores = {name: np.load(os.path.join(folder, f"{name}.npy")) for name in _SIDES}
        compressed = np.load(os.path.join(folder, low_rank["scores"]))
    return {
        "case": dict(sizes),
        **{
            f"{op}_time_of_{name}_over_ours": compare.ratio(timed[name, op], timed["ours", op])
            for name in _SIDES[1:]
            for op in ("fit", "score")
        },
        "seconds": {f"{name} {op}": values for (name, op), values in timed.items()},
        **agreement(scores, compressed, halves_SN, losses_SQ),
        "peer_versions": versions,
    }


def agreement(
    scores: Mapping[str, np.ndarray],
    low_rank: np.ndarray,
    halves_SN: np.ndarray,
    losses_SQ: np.ndarray,
) -> dict[str, Any]:
    """Returns how alike the sides' scores [N, Q] are, and how well each predicts the losses after training on halves."""
    from espalier.trainers.influence import measures

    def columns(one: np.ndarray, other: np.ndarray) -> Any:
        return zip(one.T, other.T, strict=True)

    ours = scores["ours"]
    lds = {
        name: float(measures.linear_datamodeling_score(x, halves_SN, losses_SQ).mean())
        for name, x in scores.items()
    }
    theirs = scores["kronfluence"]
    return {
        # The norm of the difference of all scores over that of the scores.
        "relative_difference_of_kronfluences_scores": float(
            np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        ),
        "least_spearman": {
            name: min(measures.spearman(x, y) for x, y in columns(ours, scores[name]))
            for name in _SIDES[1:]
        },
        "least_pearson_of_low_rank": min(
            float(np.corrcoef(x, y)[0, 1]) for x, y in columns(ours, low_rank)
        ),
        "linear_datamodeling_scores": lds,
        "lds_less_kronfluences": lds["ours"] - lds["kronfluence"],
    }


def write(folder: str, sizes: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Writes case.json, model/ with trained MLPs and a tokenizer, documents and queries as .npy and .jsonl.

    Returns:
      The queries' losses after training again on each half [S, Q], and whether each half has each document [S, N].
    """
    rng = np.random.default_rng(0)
    case.write_llama(folder, sizes, rng, std=_STD)
    _write_tokenizer(pathlib.Path(folder, "model"), sizes["vocab_size"])
    documents_NT, queries_QT = (
        draw(sizes, sizes[name], rng).astype(np.int32) for name in ("documents", "queries")
    )
    for name, ids, prompt in (
        ("documents", documents_NT, 1),
        ("queries", queries_QT, sizes["prompt"]),
    ):
        np.save(os.path.join(folder, f"{name}.npy"), ids)
        with open(os.path.join(folder, f"{name}.jsonl"), "w", encoding="utf-8") as file:
            for row in ids.tolist():
                labels = [-100] * prompt + row[prompt:]
                line = {"input_ids": row, "labels": labels, "length": len(row)}
                file.write(json.dumps(line) + "\n")
    halves_SN = np.stack(
        [
            rng.permutation(sizes["documents"]) < sizes["documents"] // 2
            for _ in range(sizes["halves"])
        ]
    )
    return _train(folder, sizes, documents_NT, queries_QT, halves_SN), halves_SN


def draw(sizes: Mapping[str, Any], count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns texts [count, T] of ids, each mostly of the words of one topic."""
    vocab, length = sizes["vocab_size"], sizes["tokens"]
    own = (vocab - 4) // _TOPICS
    topics = rng.integers(_TOPICS, size=(count, 1))
    words = np.minimum(rng.zipf(1.3, (count, length)) - 1, own - 1)
    anywhere = rng.integers(4, vocab, (count, length))
    return np.where(rng.random((count, length)) < 0.8, 4 + topics * own + words, anywhere)


def _write_tokenizer(folder: pathlib.Path, vocab_size: int) -> None:
    """Writes a tokenizer, which bergson loads although the data are ids."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    ids = {f"w{i}": i for i in range(vocab_size)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(os.fspath(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w1", "pad_token": "w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _train(
    folder: str,
    sizes: Mapping[str, Any],
    documents_NT: np.ndarray,
    queries_QT: np.ndarray,
    halves_SN: np.ndarray,
) -> np.ndarray:
    """Trains the MLPs and writes them into the model; returns the losses [S, Q] after training again on each half.

    All runs read the same batches, in which documents of the other half have no weight.
    """
    import jax
    import jax.numpy as jnp
    import optax

    from espalier.model.hf.load import load
    from espalier.trainers.checkpoints import state_tree
    from espalier.trainers.influence import conjugate
    from espalier.trainers.influence import sites as site_list
    from tests.benchmarks.jax import influence_jax

    model, params = load(os.path.join(folder, "model"))
    sites = site_list.select(model, params)
    flat = state_tree.flatten(params)
    own = {site.parameter: jnp.asarray(flat[site.parameter]) for site in sites.values()}
    optimizer = optax.adam(sizes["learning_rate"])

    def losses(own: Any, batch: Any) -> jax.Array:
        changed = conjugate.with_changed(params, own)
        log_probs_BTV = jax.nn.log_softmax(conjugate.logits_of(model, changed, batch))
        targets_BT1 = batch["decoder_target_tokens"][..., None]
        picked_BT = jnp.take_along_axis(log_probs_BTV, targets_BT1, axis=-1)[..., 0]
        return -(picked_BT * batch["decoder_loss_weights"]).sum(-1)

    @jax.jit
    def step(own: Any, state: Any, batch: Any, weights_B: jax.Array) -> Any:
        def mean(own: Any) -> jax.Array:
            return (losses(own, batch) * weights_B).sum() / weights_B.sum() / sizes["tokens"]

        updates, state = optimizer.update(jax.grad(mean)(own), state)
        return optax.apply_updates(own, updates), state

    order_SB = np.random.default_rng(1).integers(
        sizes["documents"], size=(sizes["steps"], sizes["batch_size"])
    )
    batches = [influence_jax.batch_of(documents_NT[chosen]) for chosen in order_SB]
    queries = influence_jax.batch_of(queries_QT, sizes["prompt"])
    query_losses = jax.jit(losses)

    def trained(own: Any, kept_N: np.ndarray) -> Any:
        state = optimizer.init(own)
        for chosen, batch in zip(order_SB, batches, strict=True):
            own, state = step(own, state, batch, jnp.asarray(kept_N[chosen], jnp.float32))
        return own

    own = trained(own, np.ones(sizes["documents"], bool))
    halves = [trained(own, kept_N) for kept_N in halves_SN]
    replace_mlps(folder, sizes, {path: np.asarray(x) for path, x in own.items()})
    return np.stack([np.asarray(query_losses(half, queries), np.float64) for half in halves])


def replace_mlps(folder: str, sizes: Mapping[str, Any], own: Mapping[str, np.ndarray]) -> None:
    """Writes the model again with other kernels of its MLPs, by path of the parameter [L, X, Y]."""
    from espalier.model.hf.files.safetensors_files import SafetensorsReader

    old = os.path.join(folder, "first")
    os.rename(os.path.join(folder, "model"), old)
    kernels = {path.split("/")[-2]: value for path, value in own.items()}
    with SafetensorsReader(old) as reader:

        def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
            del shape
            if ".mlp." not in name:
                return reader.read(name)
            _, _, layer, _, kind, _ = name.split(".")
            return kernels[kind.removesuffix("_proj")][int(layer)].T

        case.write_model(os.path.join(folder, "model"), case.hf_config(sizes), values)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        os.replace(os.path.join(old, name), os.path.join(folder, "model", name))
