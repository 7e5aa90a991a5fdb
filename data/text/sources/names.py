"""The sources by name."""

import difflib
from collections.abc import Iterable, Sequence

from data.text.sources import code, english, environment, languages, markup

SOURCES: dict[str, environment.Source] = {
    "english": environment.Source(english.PACKAGES, english.candidates),
    "docstrings": environment.Source(code.PYTHON_PACKAGES, code.docstring_candidates),
    "python": environment.Source(code.PYTHON_PACKAGES, code.python_candidates, files=True),
    "cpp": environment.Source(code.CPP_PACKAGES, code.cpp_candidates, files=True),
    "markup": environment.Source(markup.PACKAGES, markup.candidates, files=True),
    **languages.sources(),
}
LANGUAGES = tuple(languages.sources())
# Group -> its sources, in a list of sources and as a mixture.
GROUPS: dict[str, tuple[str, ...]] = {
    "text": ("english", "docstrings"),
    "code": ("python", "cpp"),
    "multilingual": LANGUAGES,
    "all": tuple(SOURCES),
}


def resolve(names: Iterable[str]) -> tuple[str, ...]:
    """Returns source names in the order of `SOURCES`, with groups replaced by their sources.

    Raises:
      ValueError: a name is unknown, or there are no names.
    """
    if isinstance(names, str):
        names = (names,)
    wanted: set[str] = set()
    for name in names:
        if name not in SOURCES and name not in GROUPS:
            raise ValueError(f"unknown source {name!r}; {nearest(name, [*SOURCES, *GROUPS])}")
        wanted.update(GROUPS.get(name, (name,)))
    if not wanted:
        raise ValueError(f"the list of sources is empty; choose among {', '.join(SOURCES)}")
    return tuple(name for name in SOURCES if name in wanted)


def nearest(name: str, valid: Sequence[str]) -> str:
    """Returns `did you mean ...?` for an error message, or all valid names if none is similar."""
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"valid names are {', '.join(valid)}"
