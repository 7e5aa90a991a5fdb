"""Sizes in bytes on the command line, such as 500MB or 16MiB."""

import re

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse(text: str, flag: str) -> int:
    """Returns the bytes of a size; ValueError names the flag."""
    match = re.fullmatch(r"(\d+)\s*([KMG]I?B)?", text.upper())
    if not match or not int(match[1]):
        raise ValueError(f"--{flag}={text} is not a size: give one such as 500MB or 5GB.")
    return int(match[1]) * _UNITS[match[2] or ""]
