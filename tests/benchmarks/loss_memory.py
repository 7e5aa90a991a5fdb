"""Peak memory of the loss and its gradients with 256,000 vocabulary entries, chunked against plain.

Every form runs in a fresh process. The memory in use before the step is subtracted from the peak.
"""

import resource
import time
from typing import Any

from tests.benchmarks import compare

VOCABULARY = 256_000
FORMS = ("chunked", "reference")


def run(*, tokens: int = 2048, width: int = 256) -> dict[str, Any]:
    """Measures every form on `tokens` tokens; for scale, also returns the size of one [tokens, vocabulary] array."""
    commands = {form: compare.ours("loss_memory", form, tokens, width) for form in FORMS}
    measurements = {form: compare.measured(command) for form, command in commands.items()}
    return {
        "tokens": tokens,
        "vocabulary": VOCABULARY,
        "width": width,
        "logits_of_the_batch_mb": tokens * VOCABULARY * 4 / 1e6,
        "head_mb": VOCABULARY * width * 4 / 1e6,
        **measurements,
        "peak_reference_over_chunked": (
            measurements["reference"]["peak_over_start_mb"]
            / measurements["chunked"]["peak_over_start_mb"]
        ),
    }


def side(form: str, tokens: str, width: str) -> dict[str, Any]:
    """Measures one form in this process."""
    import jax
    import jax.numpy as jnp

    from espalier.model.kernels.cross_entropy import weighted_cross_entropy

    def loss(h_TD, head_VD, targets_T):
        weights_T = jnp.ones(h_TD.shape[0])
        return weighted_cross_entropy(h_TD, head_VD, targets_T, weights_T, implementation=form)[0]

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    h_TD = jax.random.normal(jax.random.key(0), (int(tokens), int(width)))
    head_VD = 0.02 * jax.random.normal(jax.random.key(1), (VOCABULARY, int(width)))
    targets_T = jnp.arange(int(tokens), dtype=jnp.int32) % VOCABULARY
    compiled = step.lower(h_TD, head_VD, targets_T).compile()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    value, _ = jax.block_until_ready(compiled(h_TD, head_VD, targets_T))
    return {
        "loss": float(value),
        "peak_over_start_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3,
        "temporaries_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "seconds": time.perf_counter() - begin,
    }
