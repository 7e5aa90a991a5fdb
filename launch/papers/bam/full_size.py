"""BAM (arXiv 2408.08274) at full size: seeds, and mixtures of four experts; a step is the paper's million tokens."""

from launch.papers.shared.full_size import Row, tokens

_RUN = "t5x_configs/runs/pretrain.gin"

ROWS = (
    Row(
        name="bam_590m",
        title="Dense seed of 590M",
        files=("t5x_configs/models/bam_590m.gin", _RUN),
        topology="v5e:16x16",
        bindings=tokens(512, 2048),
    ),
    Row(
        name="bam_2b",
        title="Dense seed of 2B",
        files=("t5x_configs/models/bam_2b.gin", _RUN),
        topology="v5e:16x16",
        bindings=tokens(512, 2048),
    ),
    Row(
        name="btx_4x590m",
        title="BTX of four 590M seeds, the baseline",
        files=("t5x_configs/models/btx_590m.gin", _RUN),
        topology="v5e:16x16",
        bindings=tokens(512, 2048),
    ),
    Row(
        name="bam_4x590m",
        title="BAM of four 590M seeds",
        files=("t5x_configs/models/bam_4x590m.gin", _RUN),
        topology="v5e:16x16",
        bindings=tokens(512, 2048),
    ),
    Row(
        name="bam_4x2b",
        title="BAM of four 2B seeds",
        files=("t5x_configs/models/bam_2b.gin", "t5x_configs/methods/bam/bam.gin", _RUN),
        topology="v5e:16x16",
        bindings=tokens(512, 2048),
    ),
)
