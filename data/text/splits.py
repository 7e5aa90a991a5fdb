"""Which documents are held out: decided by hashes of names or texts, never by position or chance."""

import hashlib
from collections.abc import Mapping, Sequence

SPLITS = ("train", "validation")
# Part of the hash of a set of files: raise it when `in_validation` holds out other documents.
VERSION = 1
# Small sources hold out at least this much, but no more than about this share of their text.
MIN_VALIDATION_BYTES = 8_000
MAX_VALIDATION_SHARE = 0.15


def stable_hash(text: str, *, salt: str = "") -> int:
    """A 64-bit hash that is the same in every process, on every machine."""
    digest = hashlib.blake2b(f"{salt}\0{text}".encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def in_validation(text: str, fraction: float) -> bool:
    """Whether a document of a stream is held out; equal texts are always in the same split."""
    return stable_hash(text, salt="split") < fraction * 2**64


def split_whole_source(
    keys: Sequence[str], sizes: Sequence[int], *, fraction: float, assigned: Mapping[str, str]
) -> list[str]:
    """The split of each document of a source that is at hand as a whole.

    Documents are held out in the order of the hashes of their keys until `fraction` of the bytes is
    reached. Those of up to half that many bytes come first, so that one large document does not
    fill the split alone; larger ones follow only where the small ones do not suffice. Where all are
    larger than that, the smallest is held out if it is at most a third of the source. Keys that
    another source has placed (`assigned`) keep their split.
    """
    total = sum(sizes)
    target = max(fraction * total, min(MIN_VALIDATION_BYTES, MAX_VALIDATION_SHARE * total))
    if fraction == 0:
        target = 0
    chosen = {key for key in keys if assigned.get(key) == "validation"}
    held_out = sum(size for key, size in zip(keys, sizes, strict=True) if key in chosen)
    size_of: dict[str, int] = {}
    for key, size in zip(keys, sizes, strict=True):
        if key not in assigned:
            size_of[key] = size_of.get(key, 0) + size
    order = sorted(size_of, key=lambda key: stable_hash(key, salt="split"))
    for largest in (0.5 * target, target, 1.5 * target):
        for key in order:
            fits = size_of[key] <= largest and held_out + size_of[key] <= 1.5 * target
            if key not in chosen and held_out < target and fits:
                chosen.add(key)
                held_out += size_of[key]
    if fraction > 0 and not chosen and size_of:
        smallest = min(order, key=size_of.__getitem__)
        if 3 * size_of[smallest] <= total:
            chosen.add(smallest)
    return ["validation" if key in chosen else "train" for key in keys]
