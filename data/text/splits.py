"""Chooses held-out documents by hashes of names or texts, never by position or at random."""

import collections
import hashlib
from collections.abc import Iterable, Mapping, Sequence

SPLITS = ("train", "validation")
# Part of the hash of a set of files: raise it when `in_validation` holds out different documents.
VERSION = 1
# Small sources hold out at least this many bytes, but at most about this share of their text.
MIN_VALIDATION_BYTES = 8_000
MAX_VALIDATION_SHARE = 0.15


def stable_hash(text: str, *, salt: str = "") -> int:
    """Returns a 64-bit hash that is equal in every process and on every machine."""
    digest = hashlib.blake2b(f"{salt}\0{text}".encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def in_validation(text: str, fraction: float) -> bool:
    """Returns whether a document is held out, by its text; equal texts are in the same split."""
    return stable_hash(text, salt="split") < fraction * 2**64


def held_out_hashes(hashes: Iterable[int], *, fraction: float) -> set[int]:
    """Returns the hashes to hold out, so that `fraction` of all examples are held out, rounded, and at least one.

    Examples with equal hashes are in one split. If that makes the exact number impossible, fewer are held out, except
    that the smallest group is if no other fits. Nothing is held out of a source whose examples all have one hash.

    Args:
      hashes: `stable_hash(key, salt="split")` of the split key of each example.
      fraction: share of the examples to hold out; 0 holds out nothing.
    """
    sizes = collections.Counter(hashes)
    if not fraction or len(sizes) < 2:
        return set()
    remaining = max(1, round(fraction * sizes.total()))
    chosen = set()
    for value in sorted(sizes):
        if sizes[value] <= remaining:
            chosen.add(value)
            remaining -= sizes[value]
        if not remaining:
            break
    return chosen or {min(sizes, key=lambda value: (sizes[value], value))}


def split_whole_source(
    keys: Sequence[str], sizes: Sequence[int], *, fraction: float, assigned: Mapping[str, str]
) -> list[str]:
    """Returns the split of each document of a source whose documents are all known.

    Documents are held out in the order of the hashes of their keys until the target size is
    reached: `fraction` of the bytes, or more for a small source. Documents of up to half the target
    come first, so that one large document does not fill the split alone. Larger documents follow
    only if the small ones do not suffice. If no document fits, the smallest is held out if it is at
    most a third of the source. Keys that already have a split (`assigned`) retain it.

    Args:
      keys: split key of each document; documents with equal keys get the same split.
      sizes: bytes of each document.
      fraction: share of the bytes to hold out; 0 holds out nothing.
      assigned: key -> split, chosen for other sources.
    """
    total = sum(sizes)
    least = min(MIN_VALIDATION_BYTES, MAX_VALIDATION_SHARE * total)
    target = max(fraction * total, least) if fraction else 0
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
