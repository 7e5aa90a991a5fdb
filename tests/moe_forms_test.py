"""All forms of t5x_configs/methods/moe together, with methods that make mixtures, train; methods_test.py makes each by itself."""

import jax
import numpy as np
import pytest

from espalier.launch.config import gin_config
from espalier.trainers import partitioning
from espalier.trainers.optim import schedules

FORMS = {
    "bam/btx": ("balance_bias", "fine_grained", "shared_average", "sigmoid"),
    "nexus/nexus_bam": ("balance_bias", "shared_average", "sigmoid"),  # which splits no experts
}
SIZES = (
    *("MODEL_DIR='/tmp/x'", "MIXTURE_OR_TASK_NAME='python'", "TASK_FEATURE_LENGTHS={'targets': 8}"),
    *("BATCH_SIZE=2", "WARMUP_STEPS=0", "MESH={'data': 1}", "TOP_K=2", "EXPERTS=3"),
    *("config.TransformerConfig.num_layers=1", "config.TransformerConfig.scan_layers=False"),
)


def program_of(method, *forms):
    names = ("models/tiny", "data/bytes", "runs/pretrain", f"methods/{method}")
    files = [f"t5x_configs/{name}.gin" for name in (*names, *(f"methods/moe/{x}" for x in forms))]
    bindings = [*SIZES, "DOMAIN_DIM=8"] if "nexus" in method and "linear" not in method else SIZES
    config = gin_config.load(files, bindings, entry="espalier.launch.train:train")
    recipe = config.arguments()["recipe"].with_span(schedules.Span(10))
    return recipe.program(devices=jax.devices()[:1])


@pytest.mark.parametrize("method", FORMS)
def test_all_forms_together_train(method):
    """Two steps: losses are finite, the router learns and biases move."""
    program = program_of(method, *FORMS[method])
    experts = program.recipe.model.layer_settings()[0].mlp.experts
    assert experts == (3 if "nexus" in method else 12)
    with partitioning.use_mesh(program.mesh, program.rules):
        state = program.init()
        before = jax.device_get(state.params)["layers"]["block_0"]["mlp"]
        train = program.steps(1).train
        for seed in range(2):
            rng, arrays = np.random.default_rng(seed), program.recipe.abstract_batch(None)
            batch = {
                name: rng.integers(1, 2 if "ids" in name and "token" not in name else 200, x.shape)
                for name, x in arrays.items()
            }
            batch = {name: x.astype(arrays[name].dtype) for name, x in batch.items()}
            batch["source_ids"] = np.zeros_like(batch["source_ids"])
            state, metrics = train(state, jax.device_put(batch, program.batch_sharding))
            assert all(np.isfinite(jax.tree.leaves(metrics["loss"])))
            biases = jax.device_get(state.params["layers"]["block_0"]["mlp"]["choice_bias"])
            if seed == 0:  # 32 choices are not even loads of 3 experts
                assert np.abs(biases).max() == np.float32(0.001)
        after = jax.device_get(state.params)["layers"]["block_0"]["mlp"]
    router = {"bam": "kernel", "nexus": "down"}[method.split("/")[0]]
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after["router"], before["router"])
    assert max(jax.tree.leaves(moved[router])) > 0
