"""Upcycling with a router that knows the experts' domains (arXiv 2408.15901), and one expert more, with small models.

A seed, six experts and a seventh for later; mixtures with the projection router, with linear and MLP ones, and with
domain vectors that mean nothing; then each is given the seventh expert and trained on half of its domain. 30 runs for
each seed; the domains and the number of seeds after a colon:

  python -m launch.sweep --sweep launch/sweeps/nexus.py:synthetic,3 --out runs/nexus/synthetic --workers 2
"""

import ml_collections

CPU = "t5x_configs/experiments/nexus/cpu/"
METHODS = "t5x_configs/methods/"
# What the seed was trained on, the domains of the experts, and that of the one that is added.
DOMAINS = {
    "synthetic": (
        "lag_general",
        ("lag_4", "lag_5", "lag_7", "lag_9", "lag_13", "lag_15"),
        "lag_11",
    ),
    "real": (
        "english",
        ("docstrings", "python", "markup", "lang_es", "lang_nl", "lang_ja"),
        "cpp",
    ),
}
SEED_STEPS, EXPERT_STEPS, MIXTURE_STEPS, EXTENSION_STEPS = 800, 600, 600, 400
DOMAIN_DIM = 16
# Arm -> (the embeddings it reads, its router).
MIXTURES = {
    "nexus": ("ngrams", "projection"),
    "linear": ("ngrams", "linear"),
    "mlp_router": ("ngrams", "mlp"),
    "nexus_random": ("random", "projection"),
    "nexus_one_hot": ("one_hot", "projection"),
}
LOW = ("nexus", "linear")  # also with a hundredth of the balance loss
# Arm -> (the mixture that is extended, flags).
EXTENSIONS = {
    "ext_nexus": ("nexus", ()),
    "ext_linear_reset": ("linear", ("--router=reset",)),
    "ext_linear_append": ("linear", ("--router=append",)),
    "ext_random": ("nexus_random", ()),
}
