"""The sources by name."""

from collections.abc import Iterable

from espalier.common import spelling
from espalier.data.text.sources import code, english, environment, languages, markup

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
            raise ValueError(
                f"unknown source {name!r}; {spelling.nearest(name, [*SOURCES, *GROUPS])}"
            )
        wanted.update(GROUPS.get(name, (name,)))
    if not wanted:
        raise ValueError(f"the list of sources is empty; choose among {', '.join(SOURCES)}")
    return tuple(name for name in SOURCES if name in wanted)
