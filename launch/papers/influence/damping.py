"""How much damping of the curvature finds the documents of facts and predicts retraining, in tiny models that memorised them.

  python -m espalier.launch.papers.influence.damping --seed=0 --out=docs/reproductions/influence/damping_0.json
  python -m espalier.launch.papers.influence.damping --table docs/reproductions/influence/damping_*.json

A model of 0.1M parameters learns 240 lines by heart: 60 invented facts, each stated once, and worked examples of two procedures.
Then, for each method and relative damping (trainers/influence/kronecker.py):

  recall  share of the queries for facts whose first document states the fact: of 20, and of the first 8, for conjugate gradients
  rank    mean rank of that document, from 1, of the 8
  LDS     linear datamodeling score over random halves of the corpus, on which the model is trained again from one start
  self    share of 32 documents that are first among them for their own second halves, as `influence fit` prints it

Factors of `ekfac half` are fitted on every second document, as large corpora's are on a sample. About five minutes of one core for
each seed.

Criteria, written before seeds 0 to 2 ran (seed 90, which judges nothing, had shown that LDS hardly depends on the damping):

1. The default damping is the largest of DAMPINGS with which EK-FAC has a recall within 0.05 of the highest, and an LDS within 0.02 of
   the highest; both are means over the three seeds and the two fits, on all documents and on half of them. If none has both, it is
   that with the highest recall among those with the LDS.
2. The default number of documents of conjugate gradients is the smallest of CG_DOCUMENTS with which their recall, by the mean over
   seeds and CG_DAMPINGS, is at least that of EK-FAC for the same queries and dampings. If it is the whole corpus, the default is all
   documents that `influence fit` stores for it.

Shapes: N documents, Q queries, S halves, B rows of a batch, U updates.
"""

if __name__ == "__main__":
    from espalier.launch.papers.influence import damping

    raise SystemExit(damping.main())

import argparse
import functools
import json
import pathlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch import cli
from espalier.launch.papers.influence import small_corpus

FACTS, EXAMPLES = 60, 90  # documents: of facts, and of each procedure
ASKED, ASKED_EXAMPLES = 20, 10  # queries: for facts, and for each procedure
DAMPINGS = (1.0, 0.1, 0.01, 1e-3, 1e-4)
CG_DAMPINGS, CG_DOCUMENTS, CG_STEPS = (0.1, 1e-3), (16, 64, 240), 10
CG_ASKED = 8  # queries
SAMPLE = 32  # documents that are queried by their second halves
HALVES = 24
BATCH, LENGTH = 40, 48
STARTED, RETRAINED = 1200, 150  # updates
RATE, RATE_AGAIN = 3e-3, 5e-4
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return cli.run_command(__doc__, "damping", _run, add_flags=_add_flags, argv=argv)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="random seed of corpus, model, labels and halves (default 0)",
    )
    parser.add_argument("--out", metavar="FILE", help="write the results to this JSON file")
    parser.add_argument(
        "--table", nargs="+", metavar="FILE", help="print the mean over these files of results"
    )


def _run(flags: argparse.Namespace) -> None:
    if flags.table:
        results = [json.loads(pathlib.Path(name).read_text()) for name in flags.table]
        print("\n".join(table(results)))
        return
    result = measure(flags.seed)
    print(json.dumps(result, indent=1))
    if flags.out:
        path = pathlib.Path(flags.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def lines(rng: np.random.Generator) -> tuple[list[str], list[tuple[str, str]], np.ndarray]:
    """Returns the documents, the queries (prompt, completion), and the document [ASKED] that states each asked fact."""
    names: list[str] = []
    while len(names) < 2 * FACTS:
        name = "".join(
            letters[rng.integers(len(letters))] for letters in (_CONSONANTS, _VOWELS) * 3
        )
        if name not in names:
            names.append(name)
    documents = [f"the mayor of {names[i]} is {names[FACTS + i]}." for i in range(FACTS)]
    asked = [(f"the mayor of {names[i]} is", f" {names[FACTS + i]}.") for i in range(ASKED)]
    for procedure in small_corpus.PROCEDURES:
        numbers = [f"{n:03d}" for n in rng.permutation(1000)[: EXAMPLES + ASKED_EXAMPLES]]
        examples = [worked(procedure, number) for number in numbers]
        documents += ["".join(one) for one in examples[:EXAMPLES]]
        asked += examples[EXAMPLES:]
    order = rng.permutation(len(documents))
    return [documents[i] for i in order], asked, np.argsort(order)[:ASKED]


def worked(procedure: str, number: str) -> tuple[str, str]:
    """Returns the beginning and the rest of a worked example."""
    result = small_corpus.solve(procedure, number)
    pairs = zip(number, result, strict=True)
    add_one = procedure == small_corpus.ADD_ONE
    steps = [f"{old} to {new}" if add_one else f"take {new}" for old, new in pairs]
    return f"{procedure.replace('_', ' ')} {number}:", f" {', '.join(steps)}. {result}"


def measure(seed: int) -> dict[str, Any]:
    """Returns the measures of one seed by method and damping."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from espalier.launch.papers.influence import completions
    from espalier.model.config import TransformerConfig
    from espalier.model.transformer import Transformer
    from espalier.trainers.influence import measures
    from espalier.trainers.scoring.scoring import Row

    began = time.monotonic()
    rng = np.random.default_rng((seed, 4))
    texts, asked, stated = lines(rng)
    ids = {symbol: i + 1 for i, symbol in enumerate(small_corpus.SYMBOLS)}

    def encoded(text: str) -> list[int]:
        return [ids[symbol] for symbol in text]

    rows = [Row(context=[0], targets=encoded(text)) for text in texts]
    wanted = [Row(context=[0, *encoded(p)], targets=encoded(c)) for p, c in asked]
    config = TransformerConfig(vocab_size=64, num_layers=2, embed_dim=64, num_heads=4, mlp_dim=128)
    model = Transformer(config=config)
    documents, queries = completions.batch_of(rows), completions.batch_of(wanted)
    start = nn.meta.unbox(model.init(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32)))["params"]
    train = jax.jit(functools.partial(trained, model, documents), static_argnames="peak")
    everything = np.ones(len(rows), np.float32)

    def order(updates: int, seed: int) -> np.ndarray:
        own = np.random.default_rng((seed, updates))
        count = len(rows) // BATCH
        epochs = -(-updates // count)
        order = np.concatenate([own.permutation(len(rows)) for _ in range(epochs)])
        return order[: updates * BATCH].reshape(updates, BATCH)

    first = train(start, order(STARTED, seed), everything, peak=RATE)
    again = order(RETRAINED, seed)
    params = train(first, again, everything, peak=RATE_AGAIN)
    loss, nats_Q, right_Q = losses(model, params, documents, queries)
    halves_SN = np.stack([rng.permutation(len(rows)) < len(rows) // 2 for _ in range(HALVES)])
    losses_SQ = np.stack(
        [
            losses(
                model,
                train(first, again, half.astype(np.float32), peak=RATE_AGAIN),
                documents,
                queries,
            )[1]
            for half in halves_SN
        ]
    )
    retrained = time.monotonic() - began
    scores, own = all_scores(model, params, rows, wanted, seed)
    out: dict[str, Any] = {
        "seed": seed,
        "loss": loss,
        "answered": float(right_Q[:ASKED].mean()),
        "nats": float(nats_Q[:ASKED].mean()),
        "rows": {},
    }
    for name, scores_NQ in scores.items():
        ranks = np.array(
            [1 + (own_N > own_N[at]).sum() for own_N, at in zip(scores_NQ.T, stated, strict=False)]
        )
        columns = losses_SQ[:, : scores_NQ.shape[1]]
        lds_Q = measures.linear_datamodeling_score(scores_NQ, halves_SN, columns)
        out["rows"][name] = {
            "recall": float((ranks == 1).mean()) if len(ranks) > CG_ASKED else None,
            "recall_8": float((ranks[:CG_ASKED] == 1).mean()),
            "rank_8": float(ranks[:CG_ASKED].mean()),
            "lds": float(lds_Q.mean()) if len(ranks) > CG_ASKED else None,
            "lds_8": float(lds_Q[:CG_ASKED].mean()),
            "self": own.get(name),
        }
    return out | {"seconds": [retrained, time.monotonic() - began]}


def trained(
    model: Any, documents: Any, params: Any, order_UB: Any, weights_N: Any, *, peak: float
) -> Any:
    """Returns the parameters after one Adam update for each row of `order_UB`; documents of weight 0 add no loss."""
    import jax
    import jax.numpy as jnp
    import optax

    rate = optax.cosine_decay_schedule(peak, len(order_UB))
    optimizer = optax.adam(rate, b2=0.95)

    def update(state: Any, chosen_B: Any) -> tuple[Any, None]:
        params, moments = state
        batch = jax.tree.map(lambda x: jnp.asarray(x)[chosen_B], documents)

        def loss(params: Any) -> Any:
            nll_BT, mask_BT = _nll(model, params, batch)
            return (nll_BT * weights_N[chosen_B, None]).sum() / mask_BT.sum()

        changes, moments = optimizer.update(jax.grad(loss)(params), moments)
        return (optax.apply_updates(params, changes), moments), None

    (params, _), _ = jax.lax.scan(update, (params, optimizer.init(params)), order_UB)
    return params


def _nll(model: Any, params: Any, batch: Any) -> tuple[Any, Any]:
    import jax
    import jax.numpy as jnp

    from espalier.trainers.influence import conjugate

    logp_BTV = jax.nn.log_softmax(conjugate.logits_of(model, params, batch))
    logp_BT = jnp.take_along_axis(logp_BTV, batch["decoder_target_tokens"][..., None], -1)[..., 0]
    mask_BT = batch["decoder_loss_weights"]
    return -logp_BT * mask_BT, mask_BT


def losses(model: Any, params: Any, documents: Any, queries: Any) -> tuple[float, Any, Any]:
    """Returns nats per token of the documents, and nats [Q] of the queries and whether all their tokens are the most probable."""
    measured = _measured(model)
    nats_N, _ = measured(params, documents)
    nats_Q, right_Q = measured(params, queries)
    tokens = documents["decoder_loss_weights"].sum()
    return float(np.sum(nats_N) / tokens), np.asarray(nats_Q, np.float64), np.asarray(right_Q)


@functools.cache
def _measured(model: Any) -> Any:
    from espalier.launch.papers.influence import completions

    return completions.measure(model)


def all_scores(
    model: Any, params: Any, rows: Sequence[Any], wanted: Sequence[Any], seed: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Returns scores [N, Q] by method and damping, and the recall of sample documents by their second halves."""
    from espalier.launch.papers.influence import completions
    from espalier.trainers.influence import conjugate, kronecker, queries, scores, sweep
    from espalier.trainers.influence import fit as stages
    from espalier.trainers.influence import sites as site_list

    reader = stages.Reader(model=model, params=params, batch_size=BATCH)
    sites = site_list.select(model, params)
    sample = [sweep.halved(row) for row in rows[:SAMPLE]]
    product = conjugate.gauss_newton(model, sites)
    settings = stages.FitSettings(seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        own = pathlib.Path(folder)
        for name, fitted in (("all", rows), ("half", rows[::2])):
            stages.fit(reader, own / name, lambda fitted=fitted: fitted, settings)
        curvatures = {
            (name, value): stages.read_curvature(
                *(own / folder, sites, strategy, kronecker.Damping(value))
            )
            for name, strategy, folder in (
                ("ekfac", "ekfac", "all"),
                ("ekfac half", "ekfac", "half"),
                ("kfac", "kfac", "all"),
            )
            for value in DAMPINGS
        }
    ways: dict[str, Any] = {"identity": (None, None)}
    for (strategy, value), curvature in curvatures.items():
        ways[f"{strategy} {value:g}"] = (curvature, None)
    for count in CG_DOCUMENTS:
        arrays = completions.batch_of(rows[:count])
        for value in CG_DAMPINGS:

            def refine(q, arrays=arrays, curvature=curvatures["ekfac", value]):
                solution = conjugate.solve(
                    lambda v: product(params, arrays, v), curvature, q, steps=CG_STEPS
                )
                return solution.x, solution.note

            ways[f"ekfac_cg of {count}, {value:g}"] = (None, refine)
    every, recall = {}, {}
    for name, (precondition, refine) in ways.items():
        asked = [*wanted[:CG_ASKED]] if refine else [*wanted, *sample]
        ready = queries.prepare(reader, sites, asked, precondition, rank=None, refine=refine)
        all_NQ = np.array([one.scores for one in scores.score(reader, sites, ready, rows)])
        every[name] = all_NQ[:, : len(wanted)]
        if not refine:
            among = all_NQ[:SAMPLE, len(wanted) :]
            recall[name] = float((among.argmax(0) == np.arange(SAMPLE)).mean())
    return every, recall


def table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns lines of Markdown: means over seeds."""
    names = [*results[0]["rows"]]
    out = [
        "| method, damping | recall | of 8 | rank, of 8 | LDS | of 8 | self |",
        "|---" * 7 + "|",
    ]
    for name in names:
        rows = [result["rows"][name] for result in results]

        def mean(key: str, form: str, rows: Any = rows) -> str:
            values = [row[key] for row in rows]
            return "" if None in values else format(float(np.mean(values)), form)

        cells = [mean("recall", ".0%"), mean("recall_8", ".0%"), mean("rank_8", ".1f")]
        cells += [mean("lds", ".3f"), mean("lds_8", ".3f"), mean("self", ".0%")]
        out.append(f"| {name} | {' | '.join(cells)} |")
    return out
