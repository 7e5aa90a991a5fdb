"""What the sweep evaluates after a run: accuracies of held-out compositions, and what routers choose on them.

Shapes: N examples, S and T tokens of inputs and targets, L layers, E experts.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.mov import compositions, rows

ROWS = 32  # of each composition and template, in what routers read
INPUTS, TARGETS = 64, 16  # tokens that they are padded to
SEED = 1  # of these rows, the same for all runs
KINDS = ("attention", "cross_attention", "mlp")
STACKS = ("encoder", "decoder")
_PROBABILITIES = "router_probs"


def ranks(run_dir: str) -> dict[str, Any]:
    """Returns what `launch.evaluate ranks` measures: mean accuracies, and by task and template."""
    from espalier.launch.config import gin_config
    from espalier.launch.evaluate import ranks
    from espalier.launch.load import load_run

    files = load_run.whole_files(run_dir, (), trust_config=True, own=ranks.GIN)
    config = gin_config.load(
        [], ["TRAIN_SETS={}"], entry="espalier.launch.evaluate.ranks:evaluate", defaults=files
    )
    scores = ranks.evaluate(**{**config.arguments(), "checkpoint": run_dir})
    tasks = {}
    for name, values in scores.pop("tasks").items():
        (templates,) = values.pop("templates").values()
        tasks[name] = {
            **values,
            "templates": {x: round(y["accuracy"], 5) for x, y in templates.items()},
        }
    return {**scores, "tasks": tasks}


def routing(run_dir: str) -> dict[str, Any]:
    """Returns what a run's routers choose on held-out compositions, by kind of site and layer, the encoder's first.

    Returns:
      {"chosen": {composition: {kind: [layer][expert]}}, the share of tokens whose first choice an expert is;
      "distances": {kind: [layer]: {"tasks", "wordings", "rows"}}}, how far mean probabilities lie apart, as total
      variation: those of two compositions under one template, of two templates of one composition, and of the halves of the
      rows of one composition and template. A kind is one of KINDS; its sites (keys and values, all heads) count alike.
    """
    import jax

    from espalier.launch.load import load_run

    with load_run.config_of(run_dir).load(run_dir, encoder_decoders=True) as run:
        sown = jax.jit(functools.partial(_intermediates, run.model))
        probable, chosen = {}, {}
        for pair in compositions.split_pairs(0)[1]:
            texts = [_texts(pair, template) for template in rows.TEMPLATES.values()]
            by_template = [_shares(run, sown, *each) for each in texts]
            name = rows.name_of(pair)
            probable[name] = [[half["probable"] for half in halves] for halves in by_template]
            every = [half["chosen"] for halves in by_template for half in halves]
            chosen[name] = {
                kind: np.mean([one[kind] for one in every], 0).round(4).tolist()
                for kind in every[0]
            }
    return {"chosen": chosen, "distances": distances(probable)}


def _texts(pair: compositions.Pair, template: str) -> tuple[list[str], list[str]]:
    """Returns inputs and right answers."""
    drawn = rows.draw([pair], ROWS, np.random.default_rng(SEED))
    inputs = [template.format(**row) for row in drawn]
    return inputs, [row["choices"][row["label"]] for row in drawn]


def _shares(
    run: Any, sown: Callable[..., Any], inputs: Sequence[str], answers: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns what `means` does for each half of the rows; `sown` is `_intermediates` of the model."""
    vocabulary = run.vocabulary
    inputs_NS, answers_NT = (
        _padded([[*vocabulary.encode(text), vocabulary.eos_id] for text in texts], length)
        for texts, length in ((inputs, INPUTS), (answers, TARGETS))
    )
    written = sown(run.params, inputs_NS, answers_NT)
    halves_HN = np.arange(len(inputs_NS)) % 2 == np.arange(2)[:, None]
    return [
        means(
            written,
            {
                "encoder": (inputs_NS != 0) & half_N[:, None],
                "decoder": (answers_NT != 0) & half_N[:, None],
            },
        )
        for half_N in halves_HN
    ]


def _intermediates(model: Any, params: Any, inputs_NS: Any, answers_NT: Any) -> Any:
    """Returns what a model sows on padded inputs and right answers."""
    import jax.numpy as jnp

    from espalier.model import rows

    batch = {
        "encoder_input_tokens": inputs_NS,
        "encoder_segment_ids": (inputs_NS != 0).astype(jnp.int32),
        "decoder_segment_ids": (answers_NT != 0).astype(jnp.int32),
    }
    variables = {"params": params}
    with rows.given(model.row_context(variables, batch)):
        _, written = model.apply(
            variables,
            jnp.pad(answers_NT, ((0, 0), (1, 0)))[:, :-1],
            encoder_tokens_BS=inputs_NS,
            encoder_segments_BS=batch["encoder_segment_ids"],
            segments_BT=batch["decoder_segment_ids"],
            mutable=["intermediates"],
            method="hidden",
        )
    return written["intermediates"]


def _padded(ids: Sequence[Sequence[int]], length: int) -> np.ndarray:
    return np.array([[*row, *[0] * (length - len(row))] for row in ids], np.int32)


def means(intermediates: Mapping[str, Any], real: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns {"probable", "chosen"}, each {kind: [L, E]}: means over a layer's sites of this kind and over real tokens.

    Args:
      intermediates: what a model with scanned layers sowed.
      real: stack -> whether a token counts, [N, tokens].
    """
    sites: dict[tuple[str, str], list[np.ndarray]] = {}
    for path, probs in _sown(intermediates):
        stack, kind = path[0], next((x for x in path if x in KINDS), None)
        if kind is None:
            continue
        # Keys and values of cross-attention are made of the encoder's output.
        of_inputs = stack == "encoder" or (kind == KINDS[1] and path[-2] in ("key", "value"))
        sites.setdefault((kind, stack), []).append(
            _of_layers(probs, real["encoder" if of_inputs else "decoder"])
        )
    out: dict[str, dict[str, np.ndarray]] = {"probable": {}, "chosen": {}}
    for kind in KINDS:
        stacks = [np.mean(sites[kind, x], axis=0) for x in STACKS if (kind, x) in sites]
        if stacks:
            both_2LE = np.concatenate(stacks, axis=1)
            out["probable"][kind], out["chosen"][kind] = both_2LE
    return out


def _sown(tree: Any, path: tuple[str, ...] = ()) -> Any:
    for name, value in tree.items():
        if name == _PROBABILITIES:
            yield path, np.asarray(value[0], np.float64)
        elif isinstance(value, Mapping):
            yield from _sown(value, (*path, name))


def _of_layers(probs: np.ndarray, real_NT: np.ndarray) -> np.ndarray:
    """Returns mean probabilities and shares of first choices [2, L, E] of [L, N, T, E] or, with heads, [L, N, T, H, E]."""
    probs = probs if probs.ndim == 5 else probs[..., None, :]
    first = np.eye(probs.shape[-1])[probs.argmax(-1)]
    weights = real_NT[None, :, :, None, None] / real_NT.sum()
    return np.stack([(each * weights).sum((1, 2)).mean(1) for each in (probs, first)])


def distances(
    probable: Mapping[str, Sequence[Sequence[Mapping[str, np.ndarray]]]],
) -> dict[str, Any]:
    """Returns {kind: [{"tasks", "wordings", "rows"} of each layer]}; see `routing`.

    Args:
      probable: composition -> for each template, for each half of the rows {kind: [L, E]}.
    """
    out = {}
    for kind in next(iter(probable.values()))[0][0]:
        # Compositions, prompt templates, halves of the rows.
        shares_CPHLE = np.array(
            [[[half[kind] for half in halves] for halves in each] for each in probable.values()]
        )
        whole_CPLE = shares_CPHLE.mean(2)
        halves_HXLE = np.concatenate(shares_CPHLE).swapaxes(0, 1)
        apart = {
            "tasks": _apart(whole_CPLE),
            "wordings": _apart(whole_CPLE.swapaxes(0, 1)),
            "rows": _apart(halves_HXLE),
        }
        out[kind] = [
            {name: round(float(values_L[layer]), 6) for name, values_L in apart.items()}
            for layer in range(whole_CPLE.shape[2])
        ]
    return out


def _apart(shares_XYLE: np.ndarray) -> np.ndarray:
    """Returns the mean total variation [L] between two members of the first axis, over all pairs and the second axis."""
    one, other = np.triu_indices(len(shares_XYLE), 1)
    gaps = np.abs(shares_XYLE[one] - shares_XYLE[other]).sum(-1) / 2
    return gaps.mean((0, 1))
