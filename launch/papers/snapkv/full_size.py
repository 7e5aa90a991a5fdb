"""SnapKV (arXiv 2404.14469) at full size: a prompt of 131,072 tokens is read and continued, with and without SnapKV.

The model has the shape of the paper's LWM-Text-Chat-1M, which is Llama 2 7B's; weights are bfloat16.
"""

from launch.aot.table_rows import Row, tokens

_FILES = (
    *("t5x_configs/models/llama2_7b.gin", "t5x_configs/runs/pretrain.gin"),
    "t5x_configs/partitioning/tp.gin",
)
_SNAPKV = ("--cache_policy=snapkv", "--cache=capacity=1024")


def _row(name: str, title: str, *flags: str, rows: int = 1) -> Row:
    return Row(
        name=name,
        title=title,
        files=_FILES,
        topology="v5e:2x4",
        bindings=(*tokens(rows, 131_072), "config.TransformerConfig.param_dtype='bfloat16'"),
        flags=flags,
    )


ROWS = (
    _row("decode_128k_full", "7B, one row of 131,072 tokens, whole cache", "--program=decode"),
    _row("decode_128k_snapkv", "7B, one row, SnapKV of 1,024", "--program=decode", *_SNAPKV),
    _row(
        "decode_128k_snapkv_64_rows",
        "7B, 64 rows, SnapKV of 1,024",
        *("--program=decode", *_SNAPKV),
        rows=64,
    ),
    _row("prefill_128k_snapkv", "7B, reading one row, SnapKV", "--program=prefill", *_SNAPKV),
)
