"""A training stream that needs no corpus."""

import numpy as np


class RandomRows:
    """A stream of random token ids; the cost of a training step does not depend on the ids."""

    source_names = ("random",)

    def __init__(self, batch_size: int, length: int, vocab_size: int):
        self.batch_size, self.length, self._vocab_size = batch_size, length, vocab_size

    def batch(self, step: int, lo: int, hi: int) -> dict[str, np.ndarray]:
        shape = (self.batch_size, self.length)
        ids = np.random.default_rng(step).integers(4, self._vocab_size, shape).astype(np.int32)
        whole = {
            "decoder_input_tokens": np.roll(ids, 1, axis=1),
            "decoder_target_tokens": ids,
            "decoder_loss_weights": np.ones(shape, np.float32),
            "decoder_segment_ids": np.ones(shape, np.int32),
            "decoder_positions": np.broadcast_to(np.arange(self.length, dtype=np.int32), shape),
            "source_ids": np.zeros(self.batch_size, np.int32),
        }
        return {name: array[lo:hi] for name, array in whole.items()}
