"""Aya 23 (arXiv 2405.15032) at full size: instruction tuning of 8B and 35B, 35B on several layouts, and LoRA of 35B."""

from launch.aot.table_rows import Row, mesh, tokens

_FULL = "t5x_configs/experiments/aya23/full/"
_DATA = ("INITIAL_CHECKPOINT_PATH=run", "TOKENIZER=tokenizer", "INSTRUCTIONS_DIR=data")
_35B = ("t5x_configs/models/aya23_35b.gin", "t5x_configs/runs/pretrain.gin")

ROWS = (
    Row(
        name="aya23_8b",
        title="8B, instruction tuning, the paper's batch",
        files=(f"{_FULL}8b.gin",),
        topology="v5e:16x16",
        bindings=_DATA,
    ),
    Row(
        name="aya23_35b",
        title="35B, instruction tuning, the paper's batch",
        files=(f"{_FULL}35b.gin",),
        topology="v5e:16x16",
        bindings=_DATA,
    ),
    Row(
        name="aya23_35b_fsdp",
        title="35B, rows of 2,048, without a tensor axis",
        files=_35B,
        topology="v5e:16x16",
        bindings=tokens(256, 2048),
        note="Every chip receives all weights three times: its links are busy longer than its matrix units.",
        hbm_gb=6.23,
        bounds_from="5.929 GB in docs/precompile.md, and 5 %",
    ),
    Row(
        name="aya23_35b_tensor4",
        title="35B, rows of 2,048, a tensor axis of 4",
        files=_35B,
        topology="v5e:16x16",
        bindings=(*tokens(256, 2048), *mesh("fsdp_tp_sp", fsdp=64, tensor=4)),
        note="Weights, vocabulary and the residual stream's length are split over `tensor`.",
        sent_gb=200,
        bounds_from="two thirds of what is sent without a tensor axis, 303 GB in docs/precompile.md",
    ),
    Row(
        name="aya23_35b_tensor4_v5p",
        title="35B, rows of 2,048, a tensor axis of 4 on v5p",
        files=_35B,
        topology="v5p:4x4x4",
        bindings=(*tokens(64, 2048), *mesh("fsdp_tp_sp", fsdp=16, tensor=4)),
    ),
    Row(
        name="aya23_35b_two_slices",
        title="35B, rows of 2,048, two slices",
        files=_35B,
        topology="2xv5e:16x16",
        bindings=(*tokens(512, 2048), *mesh("fsdp_tp_sp", data=2, fsdp=64, tensor=4)),
        note="Slices are copies (`data`), which exchange gradients alone.",
        hbm_gb=6.06,
        bounds_from="5.77 GB when first compiled, and 5 %; a whole table of tokens on every chip would add 14 GB",
    ),
    Row(
        name="aya23_35b_lora",
        title="35B, LoRA of rank 16, instruction tuning",
        files=(f"{_FULL}35b.gin", "t5x_configs/methods/adapters/lora.gin"),
        topology="v5e:8x8",
        bindings=(*_DATA, *mesh("fsdp_tp_sp", fsdp=16, tensor=4)),
    ),
)
