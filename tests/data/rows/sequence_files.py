"""Writes Megatron's pair of files, field by field as its documentation lists them."""

import struct

import numpy as np

TYPES = {np.dtype(np.uint16): 8, np.dtype(np.int32): 4, np.dtype(np.int64): 5}


def write(name, rows):
    """Writes sequences [N, tokens] as NAME.bin and NAME.idx, a document each; returns the name."""
    count, tokens = rows.shape
    with open(f"{name}.bin", "wb") as file:
        file.write(rows.tobytes())
    with open(f"{name}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00")
        file.write(struct.pack("<Q", 1))
        file.write(struct.pack("<B", TYPES[rows.dtype]))
        file.write(struct.pack("<Q", count))
        file.write(struct.pack("<Q", count + 1))
        file.write(struct.pack(f"<{count}i", *[tokens] * count))
        width = tokens * rows.dtype.itemsize
        file.write(struct.pack(f"<{count}q", *(i * width for i in range(count))))
        file.write(struct.pack(f"<{count + 1}q", *range(count + 1)))
    return str(name)
