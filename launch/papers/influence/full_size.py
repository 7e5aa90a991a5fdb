"""EK-FAC influence (arXiv 2308.03296) at full size: one batch of documents of both passes of a fit, and of scores for queries.

The sums of all layers, in blocks on the diagonal (`--blocks`), eigenvectors and queries are split over all chips, as `influence fit`
and `score` do it. The models and blocks are those of plan.py, which counts storage and time of a whole fit and of 5 million scored
documents.
"""

import dataclasses

from launch.aot.table_rows import Row, mesh, tokens
from launch.papers.influence.plan import SIZES, Size

_RUN = "t5x_configs/runs/pretrain.gin"
_7B, _35B, _BAM = SIZES


def _row(name: str, size: Size, topology: str, rows: int, *bindings: str) -> Row:
    return Row(
        name=name,
        title=f"Covariances of the MLPs of {size.title} in {size.blocks} blocks, {rows} documents of 512 tokens",
        files=(size.file, _RUN),
        topology=topology,
        bindings=(*tokens(rows, 512), *bindings),
        flags=("--program=covariances", f"--blocks={size.blocks}"),
    )


def _also(row: Row, kind: str, title: str, *flags: str) -> Row:
    """Returns a row of another program of the same model."""
    return dataclasses.replace(
        row, name=f"{row.name}_{kind}", title=title, flags=(f"--program={kind}", *flags)
    )


_OF_7B = _row("ekfac_7b", _7B, "v5p:2x2x4", 16)
ROWS = (
    _OF_7B,
    _also(
        *(_OF_7B, "squares", _OF_7B.title.replace("Covariances", "Squares in the eigenbasis")),
        f"--blocks={_7B.blocks}",
    ),
    _also(_OF_7B, "scores", "Scores by the MLPs of Command R 7B of 16 documents for 100 queries"),
    _row("ekfac_35b", _35B, "v5p:4x4x4", 64, *mesh("fsdp", fsdp=64)),
    _row("ekfac_bam", _BAM, "v5e:4x4", 16),
)
