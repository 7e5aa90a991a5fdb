"""TensorFlow as SeqIO needs it: on the CPU, and silent about the accelerators it does not use."""

import os


def load() -> None:
    """Imports TensorFlow, hides accelerators from it, and drops what it prints meanwhile.

    Without this it would take the GPU memory that JAX needs. Its C++ code writes to file descriptor 2
    whatever the log level is, so the descriptor itself is turned away for the time of the import.
    """
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        import tensorflow as tf

        for kind in ("GPU", "TPU"):
            tf.config.set_visible_devices([], kind)
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
