"""Nexus (arXiv 2408.15901) at full size: four experts and a shared one of 2.8B, and a fifth expert added."""

from launch.papers.shared.full_size import Row, tokens

_FILES = ("t5x_configs/models/nexus_4x2p8b.gin", "t5x_configs/runs/pretrain.gin")

ROWS = (
    Row(
        name="nexus_4x2p8b",
        title="Nexus of 4 x 2.8B",
        files=_FILES,
        topology="v5e:16x16",
        bindings=tokens(512, 2048),
    ),
    Row(
        name="nexus_4x2p8b_extended",
        title="Nexus of 4 x 2.8B with a fifth expert",
        files=_FILES,
        topology="v5e:16x16",
        bindings=("EXPERTS=5", *tokens(512, 2048)),
    ),
)
