"""Low-rank training (arXiv 2209.13569) at full size: language models and residual networks, dense and in factors."""

from launch.aot.table_rows import Row

_FULL = "t5x_configs/experiments/low_rank/full/"


def _images(name: str, title: str, topology: str) -> Row:
    return Row(
        name=name,
        title=title,
        files=(f"{_FULL}{name}.gin",),
        topology=topology,
    )


ROWS = (
    Row(
        name="gpt2_lm1b",
        title="GPT-2 on LM1B, dense",
        files=(f"{_FULL}gpt2_lm1b.gin",),
        topology="v5e:4x4",
    ),
    Row(
        name="gpt2_lm1b_low_rank",
        title="GPT-2 on LM1B in factors of 0.62",
        files=(f"{_FULL}gpt2_lm1b_low_rank.gin",),
        topology="v5e:4x4",
        bindings=("RANK_MULTIPLE=16",),
        hbm_gb=8.92,
        bounds_from="8.494 GB in docs/precompile.md, and 5 %",
    ),
    _images("wrn28_10_dense", "WRN-28-10 on CIFAR-100, dense", "v5e:2x2"),
    _images("wrn28_10", "WRN-28-10 on CIFAR-100, factors of 0.3", "v5e:2x2"),
    _images("resnet50_dense", "ResNet-50 on ImageNet, dense", "v5e:4x4"),
    _images("resnet50", "ResNet-50 on ImageNet, factors of 0.5", "v5e:4x4"),
)
