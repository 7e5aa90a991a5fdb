"""The choice of how attention reads rows whose length the mesh splits; attention_context.py computes it."""

METHODS = ("ring", "all_to_all")


def method_for(implementation: str, size: int, kv_heads: int) -> str:
    """Returns `implementation`, or for 'auto' the method for `size` parts of a row and a device's key/value heads."""
    if implementation == "auto":
        return "ring" if kv_heads % size else "all_to_all"
    return implementation


def method_problem(implementation: str, size: int, kv_heads: int) -> str:
    """Returns why an implementation does not compute rows in `size` parts, and what does; or ''.

    Args:
      size: 1 for whole rows.
      kv_heads: key/value heads of a device.
    """
    if size == 1 and implementation in METHODS:
        return f"{implementation!r} is for rows whose length the mesh splits: use 'auto', or the rules 'fsdp_cp' with an axis 'context'"
    if implementation == "all_to_all" and kv_heads % size:
        return f"'all_to_all' divides the {kv_heads} key/value heads of a device by 'context' = {size}: use 'ring' or 'auto'"
    if size > 1 and implementation in ("blocked", "splash", "cudnn"):
        return f"{implementation!r} reads whole rows: use 'auto', 'ring' or 'all_to_all'"
    return ""
