"""EK-FAC influence (arXiv 2308.03296) at full size: sums of covariances of MLPs for one batch of documents.

The sums of all layers, in blocks on the diagonal (`--blocks`), are split over all chips, as `influence fit` does it.
"""

from launch.papers.shared.full_size import Row, mesh, tokens

_RUN = "t5x_configs/runs/pretrain.gin"

ROWS = (
    Row(
        name="ekfac_7b",
        title="Covariances of Llama 2 7B's MLPs in two blocks, 16 documents of 512 tokens",
        files=("t5x_configs/models/llama2_7b.gin", _RUN),
        topology="v5p:2x2x4",
        bindings=tokens(16, 512),
        flags=("--program=covariances", "--blocks=2"),
    ),
    Row(
        name="ekfac_35b",
        title="Covariances of Aya 23 35B's MLPs in four blocks, 64 documents of 512 tokens",
        files=("t5x_configs/models/aya23_35b.gin", _RUN),
        topology="v5p:4x4x4",
        bindings=(*tokens(64, 512), *mesh("fsdp", fsdp=64)),
        flags=("--program=covariances", "--blocks=4"),
    ),
)
