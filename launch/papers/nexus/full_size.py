"""Nexus (arXiv 2408.15901) at full size: six experts of 470M; four experts and a shared one of 2.8B, and a fifth one added."""

from launch.aot.table_rows import Row, tokens

_FILES = ("t5x_configs/models/nexus_4x2p8b.gin", "t5x_configs/runs/pretrain.gin")

ROWS = (
    Row(
        name="nexus_6x470m",
        title="Nexus of 6 x 470M",
        files=("t5x_configs/models/nexus_6x470m.gin", "t5x_configs/runs/pretrain.gin"),
        topology="v5e:16x16",
        bindings=tokens(512, 2048),
    ),
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
