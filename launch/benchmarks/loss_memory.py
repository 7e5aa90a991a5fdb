"""Peak memory of the loss and its gradients with 256,000 vocabulary entries, chunked against plain.

Every form runs in a fresh process. The memory in use before the step is subtracted from the peak.
"""

import json
import resource
import subprocess
import sys
import time
from typing import Any

VOCABULARY = 256_000
FORMS = ("chunked", "reference")


def run(*, tokens: int = 2048, width: int = 256) -> dict[str, Any]:
    """Measures every form on `tokens` tokens; for scale, also returns the size of one [tokens, vocabulary] array."""
    measurements = {form: _fresh(form, tokens, width) for form in FORMS}
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


def _fresh(form: str, tokens: int, width: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "launch.benchmarks.loss_memory", form, str(tokens), str(width)]
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(process.stdout.strip().splitlines()[-1])


def _measure(form: str, tokens: int, width: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from model.kernels.cross_entropy import weighted_cross_entropy

    def loss(h_TD, head_VD, targets_T):
        weights_T = jnp.ones(h_TD.shape[0])
        return weighted_cross_entropy(h_TD, head_VD, targets_T, weights_T, implementation=form)[0]

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    h_TD = jax.random.normal(jax.random.key(0), (tokens, width))
    head_VD = 0.02 * jax.random.normal(jax.random.key(1), (VOCABULARY, width))
    targets_T = jnp.arange(tokens, dtype=jnp.int32) % VOCABULARY
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


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
