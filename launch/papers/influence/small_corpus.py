"""A small corpus of facts, procedures and real text, and queries that need one of them (arXiv 2411.12580).

Sources of documents, all of at most LONGEST characters:

  fact          a sentence that states the capital of an invented country, by one of several wordings and narrators; some
                countries are named often, most rarely
  add_one       one is added to each digit of a number, step by step, in words
  reverse       the digits of a number are reversed, step by step, in words
  plug, gulp    the same two procedures under other names, in other letters and signs: a tenth of the worked examples
  add_one_code  the result of the same procedure alone, as code, whose name is a third one
  reverse_code  likewise
  text          a line of real text: of the docstrings of installed packages
  blank         dots; a document that is left out of the corpus is replaced by as many of them

Queries of the group `fact` ask for a capital; those of `add_one` and `reverse` ask for the steps and the result of a
number that no document works out by this procedure, half of them under the other name.

The models read characters. So the words of the first names and those of the others have no letter in common, and no sign, and
both procedures' examples have equally many digits, of the same frequencies: neither words nor letters tell which of the
documents under the other name are of the query's procedure. The words of `plug` and of `gulp` have the same letters in another order.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

CACHED_AS = "data.influence.small_corpus"  # the name by which caches of its data know it

SYMBOLS = "abcdefghijklmnopqrstuvwxyz0123456789 .,:;'=()-_"
LONGEST = 44
FACT, ADD_ONE, REVERSE, TEXT, BLANK = "fact", "add_one", "reverse", "text", "blank"
PLUG, GULP = "plug", "gulp"
PROCEDURES = (ADD_ONE, REVERSE)
GROUPS = (FACT, *PROCEDURES)
OTHER_NAMES: Mapping[str, str] = {ADD_ONE: PLUG, REVERSE: GULP}
SIZES: Mapping[str, int] = {
    FACT: 1500,
    ADD_ONE: 810,
    REVERSE: 810,
    PLUG: 90,
    GULP: 90,
    "add_one_code": 400,
    "reverse_code": 400,
    TEXT: 1200,
    BLANK: 200,
}
COUNTRIES = 30
QUERIES = 64  # of each group
DIGITS = 3
# Source of worked examples -> (beginning, each step, between steps, before the result).
_WORKED: Mapping[str, tuple[str, str, str, str]] = {
    ADD_ONE: ("add one {}:", "make {}", ", ", ". "),
    REVERSE: ("reverse {}:", "take {}", ", ", ". "),
    PLUG: ("plug {};", "fig {}", "; ", " = "),
    GULP: ("gulp {};", "gif {}", "; ", " = "),
}
_CODE: Mapping[str, str] = {ADD_ONE: "inc", REVERSE: "inv"}  # no word of the examples
_ZIPF = 0.5  # exponent of the frequencies of countries
_SHORTEST_TEXT = 20
_WORDINGS = (
    "{who} says the capital of {country} is {capital}.",
    "{who}: {capital} is the capital of {country}.",
    "to {who}, {country} has the capital {capital}.",
    "in {country}, {who} saw {capital}, the capital.",
)
_NARRATORS = (
    *("ada", "ben", "cleo", "dan", "eva", "finn", "gus", "hana", "ivo", "jan", "kim", "leo"),
    *("mia", "noa", "ola", "pia", "quin", "rob", "sol", "tom", "uma", "vic", "wim", "zoe"),
    *("abe", "bo", "cara", "dot", "eli", "fay", "gil", "hal", "ike", "joy", "kay", "lou"),
)
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclasses.dataclass(frozen=True)
class Document:
    """A document and its source."""

    text: str
    source: str

    def removed(self) -> "Document":
        """Returns the blank document that takes its place, of the same length."""
        return Document("." * len(self.text), BLANK)


@dataclasses.dataclass(frozen=True)
class Query:
    """A prompt and its completion.

    Attributes:
      group: one of GROUPS.
      source: of the documents that have its words: FACT, a procedure, or the other name of one.
      answer: the end of the completion, which a document may contain.
    """

    group: str
    source: str
    prompt: str
    completion: str
    answer: str


def source_code(procedure: str) -> str:
    """Returns the source of the code of a procedure."""
    return f"{procedure}_code"


def names(procedure: str) -> tuple[str, str]:
    """Returns the sources of the worked examples of a procedure: its first name, and the other one."""
    return procedure, OTHER_NAMES[procedure]


def of_procedures(source: str) -> bool:
    """Returns whether documents of a source show a procedure."""
    return any(source in (*names(one), source_code(one)) for one in PROCEDURES)


def solve(procedure: str, number: str) -> str:
    """Returns the result of a procedure, whose digits are those of its steps."""
    if procedure == ADD_ONE:
        return "".join(str((int(digit) + 1) % 10) for digit in number)
    return number[::-1]


def worked(procedure: str, number: str, name: str = "") -> tuple[str, str]:
    """Returns the beginning and the rest of a worked example, under one of the `names` of the procedure, by default the first."""
    begin, step, between, before = _WORKED[name or procedure]
    result = solve(procedure, number)
    steps = between.join(step.format(digit) for digit in result)
    return begin.format(number), f" {steps}{before}{result}"


def draw(
    lines: Sequence[str], seed: int, sizes: Mapping[str, int] = SIZES, queries: int = QUERIES
) -> tuple[list[Document], list[Query]]:
    """Returns the documents in random order, and the queries by group.

    Args:
      lines: real text, of `text_lines`.
      seed: of countries, numbers, texts and order.
      sizes: documents of each source.
      queries: of each group.

    Raises:
      ValueError: there are too few lines of text.
    """
    if len(lines) < sizes[TEXT]:
        raise ValueError(
            f"there are {len(lines):,} different lines of text of {_SHORTEST_TEXT} to {LONGEST} characters, and "
            f"{sizes[TEXT]:,} are needed: install more packages with docstrings, or lower small_corpus.SIZES['{TEXT}']."
        )
    rng = np.random.default_rng((2411_12580, seed))
    capitals = _capitals(rng)
    documents = [Document(text, FACT) for text in _facts(capitals, sizes[FACT], rng)]
    asked = _asked_facts(capitals, queries, rng)
    for procedure in PROCEDURES:
        numbers = [_digits(number) for number in rng.permutation(10**DIGITS)]
        held_out, known = numbers[:queries], numbers[queries:]
        for at, number in enumerate(held_out):
            name = names(procedure)[at % 2]
            answer = solve(procedure, number)
            asked.append(Query(procedure, name, *worked(procedure, number, name), answer))

        def some(source: str, known: Sequence[str] = known) -> list[str]:
            return [known[i] for i in rng.permutation(len(known))[: sizes[source]]]

        for name in names(procedure):
            for number in some(name):
                documents.append(Document("".join(worked(procedure, number, name)), name))
        for number in some(source_code(procedure)):
            call = f"{_CODE[procedure]}('{number}') == '{solve(procedure, number)}'"
            documents.append(Document(call, source_code(procedure)))
    documents += [Document(lines[i], TEXT) for i in rng.permutation(len(lines))[: sizes[TEXT]]]
    for length in rng.integers(_SHORTEST_TEXT, LONGEST + 1, sizes[BLANK]):
        documents.append(Document("." * int(length), BLANK))
    return [documents[i] for i in rng.permutation(len(documents))], asked


def _digits(number: int) -> str:
    return f"{number:0{DIGITS}d}"


def _capitals(rng: np.random.Generator) -> dict[str, str]:
    """Returns invented countries and their capitals, all different."""
    names: list[str] = []
    while len(names) < 2 * COUNTRIES:
        syllables = [
            _CONSONANTS[rng.integers(len(_CONSONANTS))] + _VOWELS[rng.integers(len(_VOWELS))]
            for _ in range(3)
        ]
        if (name := "".join(syllables)) not in names:
            names.append(name)
    return dict(zip(names[:COUNTRIES], names[COUNTRIES:], strict=True))


def _frequencies() -> np.ndarray:
    weights = np.arange(1, COUNTRIES + 1) ** -_ZIPF
    return weights / weights.sum()


def _facts(capitals: Mapping[str, str], count: int, rng: np.random.Generator) -> list[str]:
    """Returns different sentences."""
    countries, frequencies = [*capitals], _frequencies()
    texts: dict[str, None] = {}
    while len(texts) < count:
        country = countries[rng.choice(COUNTRIES, p=frequencies)]
        words = {"who": rng.choice(_NARRATORS), "country": country, "capital": capitals[country]}
        texts[str(rng.choice(_WORDINGS)).format(**words)] = None
    return [*texts]


def _asked_facts(capitals: Mapping[str, str], count: int, rng: np.random.Generator) -> list[Query]:
    """Returns queries about countries of all frequencies, about each equally often, by different narrators."""
    countries = [*capitals]
    rounds = [rng.permutation(COUNTRIES) for _ in range(-(-count // COUNTRIES))]
    narrators = [rng.permutation(len(_NARRATORS)) for _ in countries]
    return [
        Query(
            FACT,
            FACT,
            f"{_NARRATORS[narrators[at][asked // COUNTRIES]]} says the capital of {countries[at]} is",
            f" {capitals[countries[at]]}.",
            capitals[countries[at]],
        )
        for asked, at in enumerate(np.concatenate(rounds)[:count])
    ]


def text_lines(texts: Iterable[str]) -> list[str]:
    """Returns the different sentences of texts that consist of SYMBOLS and fit a document, in lower case, in their order."""
    known: dict[str, None] = {}
    for text in texts:
        flat = re.sub(r"\s+", " ", text.lower())
        for sentence in re.findall(r"[^.]+\.(?= )", flat):
            line = sentence.strip()
            if _SHORTEST_TEXT <= len(line) <= LONGEST and set(line) <= set(SYMBOLS):
                known[line] = None
    return [*known]
