"""Peak memory of the loss and its gradients with 256,000 tokens in the vocabulary."""

import json
import subprocess
import sys
from typing import Any

TOKENS, WIDTH, VOCABULARY = 2048, 256, 256_000
FORMS = ("chunked", "reference")

# A fresh process per form: the highest resident set is a process's own.
_PROGRAM = """
import json, resource, sys, time
import jax, jax.numpy as jnp
from model.cross_entropy import weighted_cross_entropy
tokens, width, vocabulary, form = *map(int, sys.argv[1:4]), sys.argv[4]
h = jax.random.normal(jax.random.key(0), (tokens, width))
head = 0.02 * jax.random.normal(jax.random.key(1), (vocabulary, width))
targets = jax.random.randint(jax.random.key(2), (tokens,), 0, vocabulary)
weights = jnp.ones(tokens)
def loss(h, head):
    return weighted_cross_entropy(h, head, targets, weights, implementation=form)[0] / tokens
step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(h, head).compile()
jax.block_until_ready((h, head))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin = time.perf_counter()
value, grads = jax.block_until_ready(step(h, head))
print(json.dumps({
    "loss": float(value),
    "seconds": time.perf_counter() - begin,
    "peak_growth_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    "compiler_temporaries_mb": step.memory_analysis().temp_size_in_bytes / 2**20,
}))
"""


def run() -> dict[str, Any]:
    """Growth of the resident set by one loss with gradients, per form of the cross-entropy."""
    sizes = [str(size) for size in (TOKENS, WIDTH, VOCABULARY)]
    found = {}
    for form in FORMS:
        command = [sys.executable, "-c", _PROGRAM, *sizes, form]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[form] = json.loads(done.stdout)
    whole = TOKENS * VOCABULARY * 4 / 2**20
    return {
        "tokens": TOKENS,
        "width": WIDTH,
        "vocabulary": VOCABULARY,
        "float32_logits_of_all_tokens_mb": whole,
        "gradients_mb": (TOKENS + VOCABULARY) * WIDTH * 4 / 2**20,
        **found,
    }
