"""BAM (arXiv 2408.08274) at full size: seeds, and mixtures of four experts; a step is the paper's million tokens."""

from launch.aot.table_rows import Row, tokens

_RUN = "t5x_configs/runs/pretrain.gin"


def _row(name: str, title: str, *files: str) -> Row:
    return Row(
        name=name,
        title=title,
        files=(*(f"t5x_configs/{file}.gin" for file in files), _RUN),
        topology="v5e:16x16",
        bindings=tokens(512, 2048),
    )


ROWS = (
    _row("bam_590m", "Dense seed of 590M", "models/bam_590m"),
    _row("bam_2b", "Dense seed of 2B", "models/bam_2b"),
    _row("btx_4x590m", "BTX of four 590M seeds, the baseline", "models/btx_590m"),
    _row("bam_4x590m", "BAM of four 590M seeds", "models/bam_4x590m"),
    _row("bam_4x2b", "BAM of four 2B seeds", "models/bam_2b", "methods/bam/bam"),
)
