"""Preference optimisation (arXiv 2410.11677) at full size: DPO of 8B with stored log-probabilities of its reference."""

from launch.aot.table_rows import Row

ROWS = (
    Row(
        name="dpo_8b",
        title="DPO of Command R7B, 32 rows of pairs of 16,384 tokens",
        files=(
            "t5x_configs/models/command_r7b.gin",
            "t5x_configs/experiments/preference/full/pairs.gin",
        ),
        topology="v5e:16x16",
        bindings=(
            *("TOKENIZER=tokenizer", "INITIAL_CHECKPOINT_PATH=run", "PAIRS=pairs.jsonl"),
            "PAIRS_VALIDATION=held_out.jsonl",
        ),
    ),
)
