"""The versions of what determines the bytes that processes write, which several processes of one piece of work must have in common."""

import importlib.metadata
import platform
from collections.abc import Mapping

from espalier import __version__

# Packages that read and encode examples.
LIBRARIES = ("jinja2", "numpy", "pyarrow", "sentencepiece", "tokenizers")


def own() -> dict[str, str]:
    """Returns the versions of this process by name; '' of a package that is not installed."""
    found = {"espalier": __version__, "Python": ".".join(platform.python_version_tuple()[:2])}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def differing(expected: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Returns what differs from what is expected, for an error; '' if nothing does."""
    return ", ".join(
        f"{name} {expected.get(name) or 'none'} (here {now.get(name) or 'none'})"
        for name in sorted(expected.keys() | now.keys())
        if expected.get(name, "") != now.get(name, "")
    )
