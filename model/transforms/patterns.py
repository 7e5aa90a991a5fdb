"""Regular expressions that come in files of others, such as a run's model.json: RE2 matches them in linear time.

The matcher of `re` tries one way to match after the other, and `(a+)+!` has exponentially many. RE2's syntax is that of
`re` without look-arounds and back-references.
"""

import functools
from typing import Any

import re2

# Projections of attention and MLPs, also of shared and routed experts, in layers of any layout.
PROJECTIONS = (r"(.*/)?(\w*attention|mlp|mlp/shared)/(query|key|value|out|gate|up|down)",)
_OPTIONS = re2.Options()
_OPTIONS.log_errors = False


class PatternError(ValueError):
    """A text that is not a regular expression of RE2."""


@functools.lru_cache(1 << 12)
def compiled(text: str) -> Any:
    """Returns a regular expression with the methods of `re.Pattern`.

    Raises:
      PatternError: see the class.
    """
    try:
        return re2.compile(text, _OPTIONS)
    except (re2.error, UnicodeError) as error:
        reason = error.args[0]
        why = reason.decode(errors="replace") if isinstance(reason, bytes) else str(error)
        raise PatternError(
            f"the pattern {text[:200]!r} is not a regular expression of RE2, which has no look-arounds and no back-references ({why[:200]})"
        ) from None


def fullmatch(pattern: str, text: str) -> bool:
    """Returns whether a regular expression matches a whole text; raises PatternError."""
    return compiled(pattern).fullmatch(text) is not None
