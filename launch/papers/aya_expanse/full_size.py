"""Aya Expanse (arXiv 2412.04261) at full size: DPO of a cluster of 8B and of 32B with stored log-probabilities of its reference."""

from launch.aot.table_rows import Row, mesh


def _dpo(size: str, topology: str, fsdp: int, tensor: int) -> Row:
    return Row(
        name=f"aya_expanse_{size}_dpo",
        title=f"DPO of {size.upper()}, 64 rows of pairs of 2,048 tokens",
        files=(
            f"t5x_configs/models/aya_expanse_{size}.gin",
            "t5x_configs/experiments/aya_expanse/preference.gin",
        ),
        topology=topology,
        bindings=(
            *("INITIAL_CHECKPOINT_PATH=run", "PAIRS=pairs.jsonl", "DOCUMENT_START=None"),
            "VOCABULARY=None",
            *mesh("fsdp_tp_sp", fsdp=fsdp, tensor=tensor),
        ),
    )


ROWS = (_dpo("8b", "v5e:8x8", fsdp=16, tensor=4), _dpo("32b", "v5e:16x16", fsdp=64, tensor=4))
