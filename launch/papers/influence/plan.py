"""Counts what EK-FAC at full size takes: storage, operations and time, from the models' shapes alone.

  python -m espalier.launch.papers.influence.plan

prints the tables of docs/use/influence_costs.md: factors from some documents, and scores of more documents for QUERIES queries. Nothing is
compiled or measured: `espalier precompile tables` compiles programs of the same models.
"""

if __name__ == "__main__":
    from espalier.launch.papers.influence import plan

    raise SystemExit(plan.main())

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from espalier.launch import cli

QUERIES, RANK = 100, 64
CHIP, CHIPS, MFU = "v5e", 256, 0.4
HOSTS, HOST_FLOPS = 32, 50e9  # float64, for the decompositions
_RUN = "t5x_configs/runs/pretrain.gin"


@dataclasses.dataclass(frozen=True)
class Work:
    """How much is read.

    Attributes:
      fitted, scored: documents of the factors, and scored ones.
      length: tokens of each.
      unit: what a document is.
    """

    fitted: int = 100_000
    scored: int = 5_000_000
    length: int = 512
    unit: str = "documents"


WORK = Work()


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and how its factors are fitted.

    Attributes:
      title: its name.
      file: gin file of the model.
      blocks: diagonal blocks of each covariance.
      top_k: experts that read a token, where there are experts.
    """

    title: str
    file: str
    blocks: int
    top_k: int = 1


# Pythia's run has 143,000 steps of 1,024 sequences, and a checkpoint every 1,000: the sequences between two of them, and factors
# from the first 25 steps of these.
STEPS = Work(25 * 1024, 1000 * 1024, 2048, "sequences")
PYTHIA = (
    Size("Pythia 410M", "t5x_configs/models/pythia_410m.gin", 1),
    Size("Pythia 1.4B", "t5x_configs/models/pythia_1p4b.gin", 1),
    Size("Pythia 6.9B", "t5x_configs/models/pythia_6p9b.gin", 2),
)
SIZES = (
    Size("Command R 7B", "t5x_configs/models/command_r7b.gin", 2),
    Size("Command R 35B", "t5x_configs/models/command_r_35b.gin", 4),
    Size("BAM, 4 x 590M", "t5x_configs/models/bam_4x590m.gin", 2),
)


@dataclasses.dataclass(frozen=True)
class Model:
    """The shapes of a model.

    Attributes:
      parameters: number of all.
      sites: tapped matrices by path, of trainers/influence/sites.py.
      train_flops: of one token in training: forward and backward with gradients of all weights, so that it bounds a pass,
        which forms none.
    """

    parameters: int
    sites: Mapping[str, Any]
    train_flops: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What one model takes; sizes are bytes, and operations those of all documents."""

    parameters: int
    weights: int
    eigenvectors_whole: int
    eigenvectors: int
    eigenvalues: int
    query_whole: int
    query: int
    scores: int
    decompositions: float
    fit_passes: float
    covariances: float
    squares: float
    score_pass: float
    score_products: float

    @property
    def factors(self) -> int:
        """On disk: covariances, eigenvectors and corrected eigenvalues."""
        return 2 * self.eigenvectors + self.eigenvalues

    @property
    def fit_hours(self) -> float:
        return _chip_hours(self.fit_passes + self.covariances + self.squares)

    @property
    def score_hours(self) -> float:
        return _chip_hours(self.score_pass + self.score_products)

    @property
    def decomposition_minutes(self) -> float:
        return self.decompositions / (HOSTS * HOST_FLOPS) / 60


def _chip_hours(flops: float) -> float:
    from espalier.launch.precompile.tpu_topology import CHIPS as KNOWN

    return flops / (MFU * KNOWN[CHIP].peak_flops) / 3600


def plan(model: Model, *, blocks: int, top_k: int = 1, work: Work = WORK) -> Plan:
    """Returns the counts of a model; a matrix [X, Y] has covariances of n blocks of s = ceil(X / n), and of Y likewise."""
    from espalier.trainers.influence.kronecker import block_size, padded_width

    def summed(count: Callable[[Any], float], *, read: bool = False) -> Any:
        """Returns a sum over all matrices; with `read`, over those that read a token."""
        return sum(
            count(site)
            * math.prod(site.scan)
            * (min(top_k, *site.stack) if read and site.stack else math.prod(site.stack))
            for site in model.sites.values()
        )

    def sides(power: int, blocks: int) -> Callable[[Any], int]:
        def count(site: Any) -> int:
            widths = (site.inputs, site.outputs)
            return sum(blocks * block_size(width, blocks) ** power for width in widths)

        return count

    def low_rank(site: Any) -> int:
        # As `queries.Compression`, which leaves a matrix whole whose smaller side is at most the rank.
        whole = min(site.inputs, site.outputs) <= RANK
        return site.inputs * site.outputs if whole else RANK * (site.inputs + site.outputs)

    def eigenvalues(site: Any) -> int:
        return padded_width(site.inputs, blocks) * padded_width(site.outputs, blocks)

    weights = summed(lambda site: site.inputs * site.outputs)
    fitted, scored = work.fitted * work.length, work.scored * work.length
    products = 2.0 * summed(sides(2, blocks), read=True)
    return Plan(
        parameters=model.parameters,
        weights=weights,
        eigenvectors_whole=4 * summed(sides(2, 1)),
        eigenvectors=4 * summed(sides(2, blocks)),
        eigenvalues=4 * summed(eigenvalues),
        query_whole=4 * weights,
        query=2 * summed(low_rank),
        scores=4 * work.scored * QUERIES,
        decompositions=9.0 * summed(sides(3, blocks)),
        fit_passes=2 * model.train_flops * fitted,
        covariances=products * fitted,
        squares=(products + 2.0 * summed(eigenvalues, read=True)) * fitted,
        score_pass=model.train_flops * scored,
        score_products=2.0 * QUERIES * summed(low_rank, read=True) * scored,
    )


def read(size: Size, length: int) -> Model:
    """Returns the shapes of a model, and its FLOPs at a length; allocates nothing."""
    import jax

    from espalier.launch.config import gin_config
    from espalier.launch.precompile.table_rows import tokens
    from espalier.trainers import initialise
    from espalier.trainers.influence import sites

    config = gin_config.load(
        (size.file, _RUN),
        tokens(1, length),
        entry="espalier.launch.train:train",
        unused={"MODEL_DIR": "''", "MIXTURE_OR_TASK_NAME": "''", "TASKS": "()"},
    )
    recipe = config.arguments()["recipe"]
    variables = initialise.abstract_variables(recipe.model)
    params = initialise.shapes_of(variables["params"])
    return Model(
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
        sites=sites.select(recipe.language_model, params),
        train_flops=3.0
        * recipe.model.forward_flops(recipe.inputs_spec.arrays(1), {**variables, "params": params}),
    )


def table(plans: Mapping[str, Plan], blocks: Mapping[str, int], work: Work) -> list[str]:
    """Returns the lines of the table, by model."""
    every = plans.values()

    def row(what: str, cell: Callable[[Plan], str]) -> str:
        return f"| {what} | {' | '.join(map(cell, every))} |"

    named = ", ".join(f"{blocks[title]} for {title}" for title in plans)
    return [
        f"| | {' | '.join(plans)} |",
        "|---" * (len(plans) + 1) + "|",
        row(
            "weights that have factors, of all",
            lambda p: f"{p.weights / 1e9:.3g}B of {p.parameters / 1e9:.3g}B",
        ),
        row("eigenvectors in float32, `--blocks=1`", lambda p: _size(p.eigenvectors_whole)),
        row(f"eigenvectors in blocks ({named})", lambda p: _size(p.eigenvectors)),
        row("eigenvalues in float32", lambda p: _size(p.eigenvalues)),
        row(
            f"eigenvalues and eigenvectors in blocks, on each of {CHIPS} chips",
            lambda p: _size((p.eigenvectors + p.eigenvalues) / CHIPS),
        ),
        row("factors on disk, with the covariances", lambda p: _size(p.factors)),
        row("one query's gradient, whole in float32", lambda p: _size(p.query_whole)),
        row(f"one query's gradient, rank {RANK} in bfloat16", lambda p: _size(p.query)),
        row(f"gradients of {QUERIES} queries, rank {RANK}", lambda p: _size(QUERIES * p.query)),
        row(
            f"gradients of {QUERIES} queries, on each of {CHIPS} chips",
            lambda p: _size(QUERIES * p.query / CHIPS),
        ),
        row(f"scores of {work.scored:,} {work.unit} in float32", lambda p: _size(p.scores)),
        row(
            "operations of the decompositions, about 9 s³ each", lambda p: f"{p.decompositions:.2g}"
        ),
        row(
            f"operations of two passes over {work.fitted:,} {work.unit}",
            lambda p: f"{p.fit_passes:.2g}",
        ),
        row("operations of the covariances", lambda p: f"{p.covariances:.2g}"),
        row("operations of rotations and squares in the second pass", lambda p: f"{p.squares:.2g}"),
        row(
            f"operations of a pass over {work.scored:,} {work.unit}",
            lambda p: f"{p.score_pass:.2g}",
        ),
        row(f"operations of products with {QUERIES} queries", lambda p: f"{p.score_products:.2g}"),
        row(f"`fit`, {CHIP} chip hours at {MFU:.0%} of the peak", lambda p: _hours(p.fit_hours)),
        row(f"`score`, {CHIP} chip hours", lambda p: _hours(p.score_hours)),
        row(f"`score`, hours on {CHIPS} chips", lambda p: _hours(p.score_hours / CHIPS)),
        row(
            f"decompositions, minutes on {HOSTS} hosts of {HOST_FLOPS / 1e9:.0f} GFLOP/s",
            lambda p: _hours(p.decomposition_minutes),
        ),
    ]


def _size(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def full_table(sizes: Sequence[Size] = SIZES, work: Work = WORK) -> list[str]:
    """Returns the lines of the table of some models."""
    plans = {
        one.title: plan(read(one, work.length), blocks=one.blocks, top_k=one.top_k, work=work)
        for one in sizes
    }
    return table(plans, {one.title: one.blocks for one in sizes}, work)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return cli.run_command(__doc__, "plan", _run, add_flags=lambda parser: None, argv=argv)


def _run(flags: argparse.Namespace) -> None:
    print("\n".join([*full_table(), "", *full_table(PYTHIA, STEPS)]))
