"""MoV (arXiv 2309.05444) at full size: T5 1.1 XXL of 11B with mixtures of vectors."""

from launch.papers.shared.full_size import Row

ROWS = (
    Row(
        name="t5_11b_mov30",
        title="T5 1.1 of 11B with MoV-30, instruction tuning",
        files=(
            "t5x_configs/models/t5_1_1_xxl.gin",
            "t5x_configs/experiments/mov/full/tuning.gin",
            "t5x_configs/methods/mov/mov.gin",
        ),
        topology="v5e:4x4",
        bindings=(
            *("ADAPTER_EXPERTS=30", "TOKENIZER=tokenizer", "INSTRUCTIONS_DIR=p3"),
            "INITIAL_CHECKPOINT_PATH=run",
        ),
    ),
)
