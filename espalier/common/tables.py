"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns the lines of a table; its cells are Markdown without line breaks, in which `|` is escaped."""
    first, *rest = (f"| {' | '.join(cells)} |" for cells in (header, *rows))
    return [first, "|" + "---|" * len(header), *rest]


def escaped(text: str) -> str:
    """Returns a text in which no `|` ends a cell."""
    return text.replace("|", "\\|")
