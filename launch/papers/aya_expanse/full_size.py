"""Aya Expanse (arXiv 2412.04261) at full size: DPO of a cluster of 32B with stored log-probabilities of its reference."""

from launch.papers.shared.full_size import Row, mesh

ROWS = (
    Row(
        name="aya_expanse_32b_dpo",
        title="DPO of 32B, 64 rows of pairs of 2,048 tokens",
        files=(
            "t5x_configs/models/aya_expanse_32b.gin",
            "t5x_configs/experiments/aya_expanse/preference.gin",
        ),
        topology="v5e:16x16",
        bindings=(
            *("INITIAL_CHECKPOINT_PATH=run", "PAIRS=pairs.jsonl", "DOCUMENT_START=None"),
            "VOCABULARY=None",
            *mesh("fsdp_tp_sp", fsdp=64, tensor=4),
        ),
    ),
)
