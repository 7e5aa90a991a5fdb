"""MoV and MoLORA (arXiv 2309.05444) at full size: T5 1.1 of 770M, 3B and 11B."""

from launch.aot.table_rows import Row

_FULL = "t5x_configs/experiments/mov/full/"
_DATA = ("TOKENIZER=tokenizer", "INSTRUCTIONS_DIR=p3", "INITIAL_CHECKPOINT_PATH=run")


def _adapted(model: str, method: str) -> tuple[str, ...]:
    """Returns the gin files of a model with adapters."""
    return (
        f"t5x_configs/models/t5_1_1_{model}.gin",
        f"{_FULL}tuning.gin",
        f"t5x_configs/methods/mov/{method}.gin",
    )


ROWS = (
    Row(
        name="t5_11b_mov30",
        title="T5 1.1 of 11B with MoV-30, instruction tuning",
        files=_adapted("xxl", "mov"),
        topology="v5e:4x4",
        bindings=("ADAPTER_EXPERTS=30", *_DATA),
    ),
    Row(
        name="t5_11b_mov30_v5p",
        title="T5 1.1 of 11B with MoV-30 on v5p",
        files=_adapted("xxl", "mov"),
        topology="v5p:2x2x4",
        bindings=("ADAPTER_EXPERTS=30", *_DATA),
    ),
    Row(
        name="t5_3b_mov30",
        title="T5 1.1 of 3B with MoV-30",
        files=_adapted("xl", "mov"),
        topology="v5e:4x4",
        bindings=("ADAPTER_EXPERTS=30", *_DATA),
    ),
    Row(
        name="t5_3b_molora10",
        title="T5 1.1 of 3B with MoLORA-10 of rank 4",
        files=_adapted("xl", "molora"),
        topology="v5e:4x4",
        bindings=("ADAPTER_EXPERTS=10", *_DATA),
    ),
    Row(
        name="t5_770m_full",
        title="T5 1.1 of 770M, all parameters",
        files=("t5x_configs/models/t5_1_1_large.gin", f"{_FULL}full_tuning.gin"),
        topology="v5e:4x4",
        bindings=_DATA,
    ),
)
