"""Fits the factors of a model on its corpus, scores all documents by each method, and removes the most influential ones.

  python -m espalier.launch.papers.influence.scoring --checkpoint=MODEL --corpus=CORPUS --to=DIR --seed=0

CORPUS is a folder of launch.papers.influence.corpus. In DIR are factors/, scores.npz with the scores of each method
[documents, queries], scores.json with what the claims compare, and the corpora without the top documents of each method.
"""

if __name__ == "__main__":
    from espalier.launch import cli
    from espalier.launch.load import load_run

    def add_flags(parser):
        load_run.add_flags(parser)
        parser.add_argument(
            "--corpus", required=True, metavar="DIR", help="read the corpus from this folder"
        )
        parser.add_argument(
            "--to", required=True, metavar="DIR", help="write the results to this folder"
        )
        parser.add_argument("--seed", type=int, default=0, help="random seed of labels")
        parser.add_argument(
            "--rankings_alone",
            action="store_true",
            help="leave out conjugate gradients, which take most of the time, and the corpora",
        )

    def start_run(start):
        from espalier.launch.papers.influence import scoring

        scoring.run(start)

    raise SystemExit(
        cli.main(
            __doc__,
            entry="espalier.launch.load.load_run:RunConfig",
            command="scoring",
            extra_flags=add_flags,
            run=start_run,
            default_files=load_run.default_files,
            unused={"MODEL": "None", "VOCABULARY": "None"},
        )
    )

import collections
import dataclasses
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.influence import outputs, scorers
from espalier.launch.load.loaded_run import LoadedRun
from espalier.launch.papers.influence import completions, corpus, statistics
from espalier.launch.papers.influence.small_corpus import (
    FACT,
    GULP,
    PLUG,
    PROCEDURES,
    Document,
    Query,
    names,
    of_procedures,
)
from espalier.trainers.influence import conjugate, kronecker, lexical, projections, queries, scores
from espalier.trainers.influence import fit as stages
from espalier.trainers.influence import sites as site_list
from espalier.trainers.scoring.scoring import MeanStates, Row

SCORES, RECORD = "scores.npz", "scores.json"
# The methods of gradients, in the order in which a set of queries has them.
GRADIENTS = ("identity", "trak", "kfac", "ekfac", "ekfac_cg")
RANDOM = "random"
METHODS = (*GRADIENTS, "cosine", "embedding", "bm25", "bm25_characters", "tfidf", RANDOM)
REMOVED_BY = ("ekfac_cg", "ekfac")
RANDOMS = ("random_0", "random_1")  # two draws, whose mean the removals are compared with
MODULES = ("mlp",)
FITTED = 3000  # documents
DAMPING = 0.1  # of the mean eigenvalue
CG_STEPS, CG_DOCUMENTS = 5, 128
PROJECTION = 32  # side of trak's projected gradients
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Removal:
    """Which documents are removed.

    Attributes:
      asked: sources of the queries for which documents are ranked.
      stays: sources of documents none of which is removed.
      share: how many are removed, as a share of the documents that `of` takes by their source.
      of: whether a source counts; random documents are drawn among these.
    """

    asked: tuple[str, ...]
    stays: tuple[str, ...]
    share: float
    of: Callable[[str], bool]

    def chosen(
        self, order_N: np.ndarray, documents: Sequence[Document], *, random: bool = False
    ) -> list[int]:
        """Returns the first documents of an order that may go; of a `random` one, the first that `of` takes too."""
        counts_N = [self.of(one.source) for one in documents]
        may_go = (
            int(i)
            for i in order_N
            if documents[i].source not in self.stays and (counts_N[i] or not random)
        )
        return [*itertools.islice(may_go, max(1, round(self.share * sum(counts_N))))]


REMOVED_FOR: Mapping[str, Removal] = {
    "fact": Removal((FACT,), (), 0.04, lambda source: source == FACT),
    "procedure": Removal(sum(map(names, PROCEDURES), ()), (), 0.1, of_procedures),
    # Queries under the other names, for which their words are of no use.
    "other_words": Removal((PLUG, GULP), (PLUG, GULP), 0.1, of_procedures),
}


def without(method: str, what: str) -> str:
    """Returns the name of the corpus, and of the arm, without the top documents of a method for some queries."""
    return f"without_{what}_{method}"


def run(start: Any) -> None:
    """Scores as the flags say."""
    import jax

    flags = start.flags
    target, source = pathlib.Path(flags.to), pathlib.Path(flags.corpus)
    target.mkdir(parents=True, exist_ok=True)
    texts, asked = corpus.read_documents(source), corpus.read_queries(source)
    with start().load(flags.checkpoint, params=flags.params) as loaded:
        rows = [completions.document_row(loaded, one) for one in texts]
        wanted = [completions.query_row(loaded, one) for one in asked]
        every, norms_N, nats_Q = all_scores(
            *(loaded, rows, wanted, target / "factors", flags.seed),
            refined=not flags.rankings_alone,
        )
        every["embedding"] = scorers.embeddings(
            MeanStates(loaded.model, loaded.params, batch_size=BATCH),
            *(rows, wanted),
            limit=loaded.model.max_length,
        )
        batch = completions.batch_of(wanted)
        _, answered_Q = completions.measure(loaded.model)(loaded.params, batch)
    every |= lexical_scores(texts, asked)
    every[RANDOM] = np.random.default_rng((flags.seed, 2)).normal(size=(len(texts), len(asked)))
    np.savez_compressed(target / SCORES, **{n: x.astype(np.float32) for n, x in every.items()})
    holds_NQ = statistics.holds(texts, asked)
    record = {
        "parameters": float(sum(x.size for x in jax.tree.leaves(loaded.params))),
        "nats": by_source(nats_Q, asked),
        "answered": by_source(np.asarray(answered_Q), asked),
        "masses": {m: statistics.masses(every[m], nats_Q, asked) for m in GRADIENTS if m in every},
        "methods": {
            method: statistics.of_scores(
                outputs.per_norm(every[method], norms_N) if method in GRADIENTS else every[method],
                *(texts, asked, holds_NQ),
            )
            for method in METHODS
            if method in every
        },
    }
    (target / RECORD).write_text(json.dumps(record) + "\n")
    if flags.rankings_alone:
        return
    rng = np.random.default_rng((flags.seed, 4))
    for what, removal in REMOVED_FOR.items():
        orders = {m: statistics.ranked_for(every[m], asked, removal.asked) for m in REMOVED_BY}
        orders |= {name: rng.permutation(len(texts)) for name in RANDOMS}
        for method, order_N in orders.items():
            gone = removal.chosen(order_N, texts, random=method in RANDOMS)
            kept = corpus.without(texts, gone)
            corpus.write_documents(target / f"{without(method, what)}.jsonl", kept)


def by_source(values_Q: np.ndarray, asked: Sequence[Query]) -> dict[str, float]:
    """Returns the mean over the queries of each source."""
    sources = np.array([query.source for query in asked])
    return {one: float(values_Q[sources == one].mean()) for one in dict.fromkeys(sources)}


def all_scores(
    loaded: LoadedRun,
    rows: Sequence[Row],
    wanted: Sequence[Row],
    folder: pathlib.Path,
    seed: int,
    *,
    refined: bool,
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Returns the scores of the methods of gradients and of the cosine [N, Q], norms of documents [N], and nats [Q].

    Args:
      loaded: the model.
      rows: the documents.
      wanted: the queries.
      folder: of the factors.
      seed: of labels and projections.
      refined: whether `ekfac_cg` is among the methods.
    """
    reader = stages.Reader(model=loaded.model, params=loaded.params, batch_size=BATCH)
    settings = stages.FitSettings(modules=MODULES, seed=seed)
    fitted = rows[:FITTED]
    stages.fit(reader, folder, lambda: fitted, settings, total=len(fitted))
    sites = site_list.select(loaded.model, loaded.params, MODULES)
    damping = kronecker.Damping(DAMPING)
    kfac, ekfac = (
        stages.read_curvature(folder, sites, strategy, damping) for strategy in ("kfac", "ekfac")
    )
    own = projections.projections(sites, PROJECTION, seed=seed)
    moment_FF = projections.second_moment(reader, sites, own, rows, total=len(rows))
    projected = projections.ProjectedCurvature.of(sites, own, moment_FF, damping)
    refine = refinement(loaded, reader, sites, ekfac, rows[:CG_DOCUMENTS])
    ways = [(None, None), (projected, None), (kfac, None), (ekfac, None)]
    ways += [(None, refine)] if refined else []
    sets = [
        queries.prepare(reader, sites, wanted, precondition, rank=None, refine=further)
        for precondition, further in ways
    ]
    joined = queries.joined(sites, sets)
    scored = list(scores.score(reader, sites, joined, rows, total=len(rows)))
    norms_N = np.array([one.norm for one in scored])
    parts = np.split(np.array([one.scores for one in scored]), len(sets), axis=1)
    every = dict(zip(GRADIENTS[: len(ways)], parts, strict=True))
    lengths = np.maximum(norms_N[:, None] * sets[0].norms, 1e-30)
    return every | {"cosine": every["identity"] / lengths}, norms_N, sets[0].nats


def refinement(
    loaded: LoadedRun,
    reader: stages.Reader,
    sites: Mapping[str, site_list.Site],
    curvature: kronecker.Curvature,
    batch: Sequence[Row],
) -> Callable[[Any], tuple[Any, Any]]:
    """Returns what refines one query's gradient by conjugate gradients on a batch of documents."""
    arrays = reader.place(completions.batch_of(batch))
    product = conjugate.gauss_newton(loaded.model, sites)

    def refine(q: Any) -> tuple[Any, Any]:
        solution = conjugate.solve(
            lambda v: product(loaded.params, arrays, v), curvature, q, steps=CG_STEPS
        )
        return solution.x, solution.note

    return refine


def lexical_scores(texts: Sequence[Document], asked: Sequence[Query]) -> dict[str, np.ndarray]:
    """Returns BM25 and TF-IDF scores [N, Q] by words and signs, and BM25 scores by characters, the model's tokens."""

    def encoded(pattern: str) -> tuple[list[list[int]], list[list[int]]]:
        """Returns the ids of what a pattern matches, of the queries and of the documents."""
        ids: dict[str, int] = collections.defaultdict(lambda: len(ids))
        both = [one.prompt + one.completion for one in asked], [one.text for one in texts]
        queries, documents = (
            [[ids[word] for word in re.findall(pattern, text)] for text in some] for some in both
        )
        return queries, documents

    words = encoded(r"\w+|[^\w\s]")
    return {
        "bm25": lexical.bm25(*words),
        "bm25_characters": lexical.bm25(*encoded(".")),
        "tfidf": lexical.tfidf(*words),
    }
