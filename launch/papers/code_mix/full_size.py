"""Code in pre-training (arXiv 2408.10914) at full size: the recipes of both models."""

from launch.aot.table_rows import Row

_FULL = "t5x_configs/experiments/code_mix/full/"
_DATA = ("DATA_ROOT=data", "TOKENIZER=tokenizer", "MBPP=mbpp.jsonl")

ROWS = (
    Row(
        name="code_mix_470m",
        title="470M, pre-training, the paper's recipe",
        files=(f"{_FULL}text_only.gin",),
        topology="v5e:16x16",
        bindings=_DATA,
        hbm_gb=2.90,
        bounds_from="2.760 GB in docs/precompile.md, and 5 %",
    ),
    Row(
        name="code_mix_2p8b",
        title="2.8B, pre-training, the paper's recipe",
        files=(f"{_FULL}text_only.gin", f"{_FULL}size_2p8b.gin"),
        topology="v5e:16x16",
        bindings=_DATA,
        hbm_gb=5.36,
        bounds_from="5.098 GB in docs/precompile.md, and 5 %",
    ),
)
