"""Methods that score documents for queries: an object each, which has the settings that it reads and makes its scorer."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from espalier.common.ranges import Count, Size
from espalier.launch.config import setting_flags
from espalier.launch.config.setting_flags import Folder, Names
from espalier.launch.influence import inputs, outputs
from espalier.launch.load import load_run
from espalier.launch.load.load_run import LoadedRun, LoadError, RunConfig
from espalier.trainers.scoring.scoring import Row

# Recorded of a method by gradients that has no such setting.
_NOT_READ: Mapping[str, Any] = {
    **{"damping": 1e-4, "damping_kind": "relative", "precision": "highest"},
    **{"cg_steps": 0, "cg_documents": 0, "projection": 0},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scan:
    """What documents are scored with.

    Attributes:
      config, checkpoint, params, run: the run, and how it was loaded (launch/load/load_run.py).
      rows, source: the queries and the documents.
      batch_size: number of documents in a batch.
      factors, fitted: folder of fitted factors and their record, or None.
    """

    config: RunConfig
    checkpoint: str
    params: str
    run: LoadedRun
    rows: Sequence[Row]
    source: inputs.Documents
    batch_size: int
    factors: str | None
    fitted: Mapping[str, Any] | None

    def sample(self) -> list[Row]:
        """Returns the first documents that the factors were fitted on."""
        return inputs.read_sample(outputs.local(self.factors or "") / outputs.SAMPLE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A method with its settings."""

    name: ClassVar[str]
    needs_factors = False
    by_document: ClassVar[bool] = True  # whether a document's scores depend on no other document
    # What only gradients can have.
    per_layer = False
    token_scores = 0

    def record(self) -> dict[str, Any]:
        """Returns the settings that scores depend on, beside the name."""
        return {}

    def scorer(self, scan: Scan) -> Any:
        """Returns what prepares the queries once, and then yields the rows of all documents from any row on.

        Raises:
          LoadError: the model or the factors do not fit.
        """
        raise NotImplementedError


class Bm25(Method):
    """Shared tokens by BM25."""

    name = "bm25"
    by_document = False

    def scorer(self, scan: Scan) -> Any:
        from espalier.launch.influence import scorers
        from espalier.trainers.influence import lexical

        return scorers.Lexical(getattr(lexical, self.name), scan.rows, scan.source)


class TfIdf(Bm25):
    """Shared tokens by TF-IDF."""

    name = "tfidf"


class Embedding(Method):
    """Cosine of mean hidden states."""

    name = "embedding"

    def scorer(self, scan: Scan) -> Any:
        from espalier.launch.influence import scorers

        return scorers.Embeddings(scan.run, scan.rows, scan.source, batch_size=scan.batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradients(Method):
    """Gradients of queries and documents.

    Attributes:
      modules: layers whose gradients count: mlp, attention, adapters, head, all, or patterns of paths; those of the factors if not set.
      query_checkpoint: model of the queries' gradients, such as a fine-tuned one, if it is another.
      rank: rank of the queries' gradients in memory; 0 for whole matrices in float32.
      query_dtype: dtype of the queries' low-rank factors; each column of int8 has a scale.
      per_layer: whether rows have "layers", the scores of each matrix.
      token_scores: for so many documents at both ends of each query's ranking, writes the influence of each token to
        OUT.tokens.jsonl.
    """

    normalised: ClassVar[bool] = False  # whether scores are divided by both norms

    modules: Names | None = None
    query_checkpoint: Folder | None = None
    rank: Count = 64
    query_dtype: Literal["bfloat16", "float32", "int8"] = "bfloat16"
    per_layer: bool = False
    token_scores: Count = 0

    def __post_init__(self):
        if self.rank == 0 and self.query_dtype != Gradients.query_dtype:
            what = "--query_dtype is of low-rank factors"
            raise LoadError(f"{what}, and --rank=0 has none: remove it.")

    def record(self) -> dict[str, Any]:
        own = {name: getattr(self, name, value) for name, value in _NOT_READ.items()}
        place = self.query_checkpoint and load_run.place(self.query_checkpoint)
        compressed = {"rank": self.rank, "query_dtype": self.query_dtype}
        return {**own, **compressed, "query_checkpoint": place}

    def scorer(self, scan: Scan) -> Any:
        from espalier.launch.influence import scorers

        return scorers.Gradients(self, scan)

    def preconditioned(self, scorer: Any, reader: Any) -> dict[str, Any]:
        """Returns what makes directions of the queries' gradients, as arguments of `queries.prepare`.

        Args:
          scorer: the `scorers.Gradients` that asks.
          reader: of the queries' model.
        """
        return {"precondition": None}


class Identity(Gradients):
    """Dot product of gradients."""

    name = "identity"


class Cosine(Gradients):
    """Cosine of gradients."""

    name = "cosine"
    normalised = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Damped(Gradients):
    """Gradients, and the inverse of a damped matrix.

    Attributes:
      damping: factor on the mean eigenvalue of each matrix, or an absolute number; ekfac_cg adds the same numbers as ekfac.
      damping_kind: whether the damping is relative to the mean eigenvalue, or absolute.
    """

    damping: float = 1e-4
    damping_kind: Literal["relative", "absolute"] = "relative"

    def __post_init__(self):
        super().__post_init__()
        _ = self.strength  # raises before any work

    @property
    def strength(self) -> Any:
        """The damping of each matrix (`trainers.influence.kronecker.Damping`)."""
        from espalier.trainers.influence import kronecker

        return kronecker.Damping(self.damping, self.damping_kind)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trak(Damped):
    """Randomly projected gradients, and the inverse of their second moment over all documents, from a pass of its own.

    Attributes:
      projection: side N of trak's projected gradients, which have N * N numbers.
    """

    name = "trak"

    projection: Size = 32

    def preconditioned(self, scorer: Any, reader: Any) -> dict[str, Any]:
        from espalier.trainers.influence import projections

        own = projections.projections(scorer.sites, self.projection)
        moment = projections.second_moment(
            *(scorer.reader, scorer.sites, own, scorer.source),
            total=scorer.source.count(),
            dtype=scorer.dtype,
        )
        curvature = projections.ProjectedCurvature.of(scorer.sites, own, moment, self.strength)
        return {"precondition": curvature}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ekfac(Damped):
    """Gradients, and the inverse of the EK-FAC curvature.

    Attributes:
      precision: rounding of products in the eigenbasis and of Gauss-Newton products on accelerators, like in `fit`.
    """

    name = "ekfac"
    needs_factors = True
    eigenvalues: ClassVar[str] = "ekfac"

    precision: Literal["highest", "high", "default"] = "highest"

    def curvature(self, scorer: Any, reader: Any) -> Any:
        """Returns the inverse of the fitted curvature."""
        from espalier.trainers.influence import fit as stages

        folder = outputs.local(scorer.scan.factors or "")
        return stages.read_curvature(
            *(folder, scorer.sites, self.eigenvalues, self.strength),
            reader=reader,
            precision=self.precision,
        )

    def preconditioned(self, scorer: Any, reader: Any) -> dict[str, Any]:
        return {"precondition": self.curvature(scorer, reader)}


class Kfac(Ekfac):
    """K-FAC, whose eigenvalues are not corrected."""

    name = "kfac"
    eigenvalues = "kfac"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EkfacCg(Ekfac):
    """EK-FAC, refined by conjugate gradients.

    Attributes:
      cg_steps: number of conjugate gradient steps of ekfac_cg.
      cg_documents: documents of its Gauss-Newton matrix, the first that factors were fitted on; at most 1,024.
    """

    name = "ekfac_cg"

    cg_steps: Count = 10
    cg_documents: Size = 16

    def __post_init__(self):
        if self.cg_documents > outputs.SAMPLED:
            at_most = f"at most {outputs.SAMPLED:,}, which `fit` stores"
            raise LoadError(f"--cg_documents={self.cg_documents} must be {at_most}.")
        super().__post_init__()

    def preconditioned(self, scorer: Any, reader: Any) -> dict[str, Any]:
        from espalier.trainers.influence import conjugate

        curvature, run = self.curvature(scorer, reader), scorer.scan.run
        rows = [row for row in scorer.scan.sample() if row.targets][: self.cg_documents]
        if not rows:
            raise LoadError(
                f"--factors={scorer.scan.factors} have no documents for ekfac_cg: fit them again."
            )
        product = conjugate.over(
            conjugate.gauss_newton(run.model, scorer.sites, self.precision),
            run.params,
            [
                (len(indices), scorer.reader.place(arrays))
                for indices, arrays in scorer.reader.batches(rows, 0)
            ],
        )

        def refine(q: Any) -> tuple[Any, Any]:
            solution = conjugate.solve(product, curvature, q, steps=self.cg_steps)
            return solution.x, {**solution.note, "documents": len(rows)}

        return {"precondition": None, "refine": refine}


METHODS: Mapping[str, type[Method]] = {
    method.name: method
    for method in (Ekfac, Kfac, EkfacCg, Identity, Cosine, Trak, Embedding, Bm25, TfIdf)
}


def add_flags(group: Any) -> None:
    """Adds --method and the flags of all methods' settings."""
    group.add_argument(
        "--method",
        choices=tuple(METHODS),
        default=Ekfac.name,
        help="ekfac, kfac, ekfac_cg (refined by conjugate gradients), identity (dot product of gradients), cosine, trak (random "
        "projections), embedding (cosine of mean hidden states), bm25 or tfidf (default ekfac)",
    )
    added: set[str] = set()
    for method in METHODS.values():
        names = [field.name for field in dataclasses.fields(method) if field.name not in added]
        if names:
            setting_flags.add(group, method, names=names)
        added.update(names)


def of_flags(flags: argparse.Namespace) -> Method:
    """Returns the method that the flags choose, with its settings.

    Raises:
      LoadError: a setting is wrong, or has another value than its default and nothing would read it.
    """
    chosen = METHODS[flags.method]
    read = {field.name for field in dataclasses.fields(chosen)}
    for method in METHODS.values():
        for name, value in setting_flags.given(flags, method).items():
            if name not in read and value != getattr(method, name):
                readers = [m.name for m in METHODS.values() if name in m.__dataclass_fields__]
                raise LoadError(
                    f"--{name} is read by --method={' or '.join(readers)} alone, and this is {chosen.name}: remove it."
                )
    return chosen(**setting_flags.given(flags, chosen))
