"""Imports TensorFlow for SeqIO: on the CPU only, and without its messages about accelerators."""

import os


def load() -> None:
    """Imports TensorFlow, hides accelerators from it, and discards its messages during the import.

    A visible GPU would make TensorFlow reserve the memory that JAX needs. TensorFlow's C++ code
    writes to file descriptor 2 at every log level, so the descriptor points to the null device
    during the import.
    """
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        import tensorflow as tf

        for kind in ("GPU", "TPU"):
            tf.config.set_visible_devices([], kind)
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
