"""What the sweep evaluates after a run: how it ranks answer choices of seen and unseen compositions, and what routers choose.

Shapes: N examples, C choices, S and T tokens of inputs and targets, L layers, E experts.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.mov import compositions, rows

# Rows of a composition, in equal parts by template, and in what routers read.
UNSEEN_ROWS, SEEN_ROWS, ROUTED_ROWS = 102, 12, 96
INPUTS, TARGETS = 16, 5  # tokens that they are padded to
BATCH = 512  # examples
SEED = 1  # of these rows, the same for all runs
KINDS = ("attention", "cross_attention", "mlp")
STACKS = ("encoder", "decoder")
_PROBABILITIES = "router_probs"


def ranks(run_dir: str) -> dict[str, Any]:
    """Returns how well a run ranks the answer choices of compositions that are tuned ('seen', other strings) and of the others.

    Returns:
      {"seen", "unseen"}, each {"accuracy", "probability", "log_probability", "tasks": {composition: the same}}: means over
      compositions. The first is the median over templates of the share of rows whose right choice is the most probable one; the others
      are means over rows of the right choice's probability among the choices, by their log-likelihoods, and of its logarithm.
    """
    from espalier.launch.load import load_run

    train, held_out = compositions.split_pairs(0)
    with load_run.config_of(run_dir).load(run_dir, encoder_decoders=True) as run:
        return {
            "seen": _ranked(run, train, SEEN_ROWS),
            "unseen": _ranked(run, held_out, UNSEEN_ROWS),
        }


def _ranked(run: Any, pairs: Sequence[compositions.Pair], count: int) -> dict[str, Any]:
    drawn = _drawn(pairs, count)
    examples = [(text, choice) for text, row in drawn for choice in row["choices"]]
    scores_NC = log_likelihoods(run, examples).reshape(-1, rows.CHOICES)
    tasks = {}
    for at, pair in enumerate(pairs):
        mine = slice(at * count, (at + 1) * count)
        labels_N = np.array([row["label"] for _, row in drawn[mine]])
        tasks[rows.name_of(pair)] = scored(scores_NC[mine], labels_N)
    means = {key: float(np.mean([task[key] for task in tasks.values()])) for key in _METRICS}
    rounded = {
        name: {key: round(value, 4) for key, value in task.items()} for name, task in tasks.items()
    }
    return {**means, "tasks": rounded}


_METRICS = ("accuracy", "probability", "log_probability")


def scored(scores_NC: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
    """Returns the metrics of `ranks` for a composition whose rows are in equal parts by template, one part after the other."""
    most_N = scores_NC.max(-1)
    totals_N = most_N + np.log(np.exp(scores_NC - most_N[:, None]).sum(-1))
    right_N = scores_NC[np.arange(len(labels_N)), labels_N] - totals_N
    correct_PN = (scores_NC.argmax(-1) == labels_N).reshape(len(rows.TEMPLATES), -1)
    values = (np.median(correct_PN.mean(-1)), np.exp(right_N).mean(), right_N.mean())
    return {name: float(value) for name, value in zip(_METRICS, values, strict=True)}


def _drawn(pairs: Sequence[compositions.Pair], count: int) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns inputs with their rows, `count` of each composition, in equal parts by template."""
    rng, out = np.random.default_rng(SEED), []
    for pair in pairs:
        for template in rows.TEMPLATES.values():
            made = rows.draw([pair], count // len(rows.TEMPLATES), rng)
            out += [(template.format(**row), row) for row in made]
    return out


def log_likelihoods(run: Any, examples: Sequence[tuple[str, str]]) -> np.ndarray:
    """Returns the log-probability of the target of each example (input, target), [N], summed over tokens and EOS."""
    import jax

    from espalier.trainers.objectives.forward import frozen_forward

    @jax.jit
    def of_batch(params: Any, batch: Any) -> Any:
        log_probs_NT = frozen_forward(run.model, params, batch).log_probs_BT()
        return (log_probs_NT * (batch["decoder_segment_ids"] != 0)).sum(-1)

    found = [np.asarray(of_batch(run.params, batch)) for batch in _batches(run, examples)]
    return np.concatenate(found)[: len(examples)].astype(np.float64)


def _batches(run: Any, examples: Sequence[tuple[str, str]]) -> Iterator[dict[str, np.ndarray]]:
    """Yields examples as a model reads them; the last batch has empty ones."""
    vocabulary = run.vocabulary
    for first in range(0, len(examples), BATCH):
        some = examples[first : first + BATCH]
        ids = [
            [[*vocabulary.encode(text), vocabulary.eos_id] for text in texts]
            for texts in zip(*some, strict=True)
        ]
        inputs_NS, targets_NT = (
            _padded([*each, *[[]] * (BATCH - len(some))], length)
            for each, length in zip(ids, (INPUTS, TARGETS), strict=True)
        )
        yield {
            "encoder_input_tokens": inputs_NS,
            "encoder_segment_ids": (inputs_NS != 0).astype(np.int32),
            "decoder_input_tokens": np.pad(targets_NT, ((0, 0), (1, 0)))[:, :-1],
            "decoder_target_tokens": targets_NT,
            "decoder_segment_ids": (targets_NT != 0).astype(np.int32),
        }


def _padded(ids: Sequence[Sequence[int]], length: int) -> np.ndarray:
    return np.array([[*row, *[0] * (length - len(row))] for row in ids], np.int32)


def routing(run_dir: str) -> dict[str, Any]:
    """Returns what a run's routers choose on unseen compositions, by kind of site and layer, the encoder's first.

    Of the two orders of a composition, which do the same, one is read.

    Returns:
      {"chosen": {composition: {kind: [layer][expert]}}, the share of tokens whose first choice an expert is;
      "distances": {kind: [layer]: {"tasks", "wordings", "rows"}}}, how far mean probabilities lie apart, as total
      variation: those of two compositions under one template, of two templates of one composition, and of the halves of the
      rows of one composition and template. A kind is one of KINDS; its sites (keys and values, all heads) count alike.
    """
    import jax

    from espalier.launch.load import load_run

    pairs = [pair for pair in compositions.split_pairs(0)[1] if pair[0] in compositions.MOVES]
    drawn = _drawn(pairs, ROUTED_ROWS)
    examples = [(text, row["choices"][row["label"]]) for text, row in drawn]
    halves = 2 * len(rows.TEMPLATES)  # of a composition: each template's rows in two
    groups = BATCH * halves // ROUTED_ROWS
    with load_run.config_of(run_dir).load(run_dir, encoder_decoders=True) as run:
        sown = jax.jit(functools.partial(_means, run.model, groups=groups))
        found = [jax.device_get(sown(run.params, batch)) for batch in _batches(run, examples)]
    # Of a composition, template and half: [C, P, H, L, E].
    probable, chosen = (
        {
            kind: np.concatenate([each[name][kind] for each in found])[
                : halves * len(pairs)
            ].reshape(len(pairs), len(rows.TEMPLATES), 2, *found[0][name][kind].shape[1:])
            for kind in found[0][name]
        }
        for name in ("probable", "chosen")
    )
    names = [rows.name_of(pair) for pair in pairs]
    return {
        "chosen": {
            name: {kind: x[at].mean((0, 1)).round(3).tolist() for kind, x in chosen.items()}
            for at, name in enumerate(names)
        },
        "distances": distances(probable),
    }


def _means(model: Any, params: Any, batch: Mapping[str, Any], *, groups: int) -> dict[str, Any]:
    """Returns the `means` of a model on a batch of inputs and right answers."""
    from espalier.model import rows

    variables = {"params": params}
    with rows.given(model.row_context(variables, batch)):
        _, written = model.apply(
            variables,
            batch["decoder_input_tokens"],
            encoder_tokens_BS=batch["encoder_input_tokens"],
            encoder_segments_BS=batch["encoder_segment_ids"],
            segments_BT=batch["decoder_segment_ids"],
            mutable=["intermediates"],
            method="hidden",
        )
    real = {stack: batch[f"{stack}_segment_ids"] != 0 for stack in STACKS}
    return means(written["intermediates"], real, groups)


def means(
    intermediates: Mapping[str, Any], real: Mapping[str, Any], groups: int = 1
) -> dict[str, Any]:
    """Returns {"probable", "chosen"}, each {kind: [G, L, E]}: means over a layer's sites of this kind and over real tokens.

    Args:
      intermediates: what a model with scanned layers sowed.
      real: stack -> whether a token counts, [N, tokens].
      groups: G, equal parts of the examples.
    """
    import jax.numpy as jnp

    sites: dict[tuple[str, str], list[Any]] = {}
    for path, probs in _sown(intermediates):
        stack, kind = path[0], next((x for x in path if x in KINDS), None)
        if kind is None:
            continue
        # Keys and values of cross-attention are made of the encoder's output.
        of_inputs = stack == "encoder" or (kind == KINDS[1] and path[-2] in ("key", "value"))
        sites.setdefault((kind, stack), []).append(
            _of_layers(probs, real["encoder" if of_inputs else "decoder"], groups)
        )
    out: dict[str, dict[str, Any]] = {"probable": {}, "chosen": {}}
    for kind in KINDS:
        stacks = [sum(sites[kind, x]) / len(sites[kind, x]) for x in STACKS if (kind, x) in sites]
        if stacks:
            both_2GLE = jnp.concatenate(stacks, axis=2)
            out["probable"][kind], out["chosen"][kind] = both_2GLE
    return out


def _sown(tree: Any, path: tuple[str, ...] = ()) -> Any:
    for name, value in tree.items():
        if name == _PROBABILITIES:
            yield path, value[0]
        elif isinstance(value, Mapping):
            yield from _sown(value, (*path, name))


def _of_layers(probs: Any, real_NT: Any, groups: int) -> Any:
    """Returns mean probabilities and shares of first choices [2, G, L, E] of [L, N, T, E] or, with heads, [L, N, T, H, E]."""
    import jax
    import jax.numpy as jnp

    probs = probs if probs.ndim == 5 else probs[..., None, :]
    experts = probs.shape[-1]
    weights_GNT = real_NT.reshape(groups, -1, real_NT.shape[1]).astype(jnp.float32)
    weights_GNT = weights_GNT / jnp.maximum(weights_GNT.sum((1, 2), keepdims=True), 1)
    first = jax.nn.one_hot(probs.argmax(-1), experts)

    def mean(each: Any) -> Any:
        # All sites of a sentence's router share one place for all tokens.
        each = jnp.broadcast_to(each, (*each.shape[:2], real_NT.shape[1], *each.shape[3:]))
        grouped = each.reshape(each.shape[0], groups, -1, *each.shape[2:]).mean(-2)
        return jnp.einsum("lgnte,gnt->gle", grouped, weights_GNT)

    return jnp.stack([mean(probs), mean(first)])


def distances(probable: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns {kind: [{"tasks", "wordings", "rows"} of each layer]}; see `routing`.

    Args:
      probable: kind -> mean probabilities of each composition, template and half of the rows, [C, P, H, L, E].
    """
    out = {}
    for kind, shares_CPHLE in probable.items():
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
