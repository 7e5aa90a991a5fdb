"""Families of problems on lists: chains of steps, windows, sorting, searching."""

import itertools
import random
import textwrap

from espalier.data.code_mix.synthetic.draft import LISTS, RESULTS, Draft, numbers

_KEEP = {
    "even": ("{x} % 2 == 0", lambda x, k: not x & 1),
    "odd": ("{x} % 2 == 1", lambda x, k: bool(x & 1)),
    "greater than {k}": ("{x} > {k}", lambda x, k: max(x, k) != k),
    "at most {k}": ("{x} <= {k}", lambda x, k: max(x, k) == k),
    "divisible by {m}": ("{x} % {m} == 0", lambda x, k: x == (x // (abs(k) + 2)) * (abs(k) + 2)),
    "different from {k}": ("{x} != {k}", lambda x, k: x - k not in (0,)),
    "negative": ("{x} < 0", lambda x, k: str(x).startswith("-")),
}
_MAP = {
    "squared": ("{x} * {x}", lambda x, k: x**2),
    "negated": ("-{x}", lambda x, k: 0 - x),
    "multiplied by {k}": ("{x} * {k}", lambda x, k: sum([x] * k) if k >= 0 else -sum([x] * -k)),
    "increased by {k}": ("{x} + {k}", lambda x, k: sum((x, k))),
    "reduced modulo {m}": ("{x} % {m}", lambda x, k: divmod(x, abs(k) + 2)[1]),
    "replaced by its absolute value": ("abs({x})", lambda x, k: max(x, -x)),
    "cut to at most {k}": ("min({x}, {k})", lambda x, k: sorted((x, k))[0]),
}
_END = {
    "returns them as a list": ("{r}", list),
    "returns their sum": ("sum({r})", lambda r: -sum(-x for x in r)),
    "returns how many there are": ("len({r})", lambda r: sum(1 for _ in r)),
    "returns the largest, or None if there is none": (
        "max({r}) if {r} else None",
        lambda r: sorted(r)[-1] if r else None,
    ),
    "returns them sorted": ("sorted({r})", lambda r: list(reversed(sorted(r, reverse=True)))),
    "returns them in reverse order": ("{r}[::-1]", lambda r: list(reversed(r))),
    "returns the distinct ones, sorted": ("sorted(set({r}))", lambda r: sorted({*r})),
}


def chain(rng: random.Random) -> Draft:
    """One to three steps that filter or map numbers, then a reduction of the result."""
    steps, conditions = [], []
    for _ in range(rng.randint(1, 3)):
        table = rng.choice((_KEEP, _MAP))
        phrase = rng.choice(list(table))
        k = rng.randint(-4, 9)
        code, right = table[phrase]
        values = {"k": k, "m": abs(k) + 2, "x": "x"}
        kind = "keep" if table is _KEEP else "map"
        steps.append((kind, code.format(**values), right, k))
        text = phrase.format(**values)
        conditions.append(
            f"keeps the numbers that are {text}" if kind == "keep" else f"takes each {text}"
        )
    phrase, end = rng.choice(list(_END.items()))
    if rng.random() < 0.5:
        lines = ["result = []", "for x in numbers:"]
        for kind, code, _, _ in steps:
            keep = [f"    if not ({code}):", "        continue"]
            lines += keep if kind == "keep" else [f"    x = {code}"]
        lines.append("    result.append(x)")
    else:
        lines = ["result = numbers"]
        for kind, code, _, _ in steps:
            tail = f"x for x in result if {code}" if kind == "keep" else f"{code} for x in result"
            lines.append(f"result = [{tail}]")
    lines.append(f"return {end[0].format(r='result')}")

    def right(xs):
        for kind, _, step, k in steps:
            xs = [x for x in xs if step(x, k)] if kind == "keep" else [step(x, k) for x in xs]
        return end[1](xs)

    number = "int" if "sum" in phrase or "how many" in phrase else "list[int]"
    returned = "int | None" if "None" in phrase else number
    return Draft(
        names=("process", "select", "transform_numbers", "pick", "summarize"),
        statement=f"Takes a list of numbers, {', then '.join(conditions)}, and {phrase}.",
        body="\n".join(lines),
        right=right,
        kinds=("list[int]", returned),
        rename=dict(numbers=LISTS, result=RESULTS, x="x value n item"),
    )


def rotate(rng: random.Random) -> Draft:
    k, side = rng.randint(1, 6), rng.choice(("left", "right"))
    sign = "" if side == "left" else "-"
    return Draft(
        names=(f"rotate_{side}", "rotated", "shift_list"),
        parameters=("items",),
        statement=f"Rotates a list to the {side} by {k} places.",
        body=f"if not items:\n    return []\nk = {sign}{k} % len(items)\nreturn items[k:] + items[:k]",
        right=lambda xs: [
            xs[(i + (k if side == "left" else -k)) % len(xs)] for i in range(len(xs))
        ],
        kinds=("list", "list"),
        rename=dict(items=LISTS, k="k shift offset"),
    )


def chunks(rng: random.Random) -> Draft:
    k = rng.randint(2, 5)
    return Draft(
        names=("chunks", "split_into_chunks", "batched"),
        parameters=("items",),
        statement=f"Splits a list into lists of {k} items; the last may be shorter.",
        body=f"result = []\nfor start in range(0, len(items), {k}):\n    result.append(items[start:start + {k}])\nreturn result",
        right=lambda xs: [
            [x for j, x in enumerate(xs) if j // k == i] for i in range(-(-len(xs) // k))
        ],
        draw=lambda rng: (numbers(rng, most=11),),
        kinds=("list", "list[list]"),
        rename=dict(items=LISTS, result=RESULTS, start="start i begin"),
    )


def windows(rng: random.Random) -> Draft:
    k = rng.randint(2, 4)
    word, code, function = rng.choice(
        (("sum", "sum(window)", sum), ("maximum", "max(window)", lambda w: sorted(w)[-1]))
        + (
            ("minimum", "min(window)", lambda w: sorted(w)[0]),
            ("span", "max(window) - min(window)", None),
        )
    )
    function = function or (lambda w: sorted(w)[-1] - sorted(w)[0])
    return Draft(
        names=(f"window_{word}", f"rolling_{word}", f"moving_{word}"),
        statement=f"Returns the {word} of each {k} numbers in a row, largest minus smallest for a span."
        if word == "span"
        else f"Returns the {word} of each {k} numbers in a row.",
        body=f"result = []\nfor end in range({k}, len(numbers) + 1):\n    window = numbers[end - {k}:end]\n    result.append({code})\nreturn result",
        right=lambda xs: [function(w) for w in zip(*(xs[i:] for i in range(k)), strict=False)],
        draw=lambda rng: (numbers(rng, most=9),),
        rename=dict(numbers=LISTS, result=RESULTS, end="end stop i", window="window part"),
    )


def accumulate(rng: random.Random) -> Draft:
    word, code, step = rng.choice(
        (
            ("sums", "total + x", lambda a, b: a + b),
            ("products", "total * x", lambda a, b: a * b),
            ("maxima", "max(total, x)", max),
        )
    )
    start = 1 if word == "products" else rng.randint(-5, 5)
    return Draft(
        names=(f"running_{word}", f"prefix_{word}", "accumulated"),
        statement=f"Returns the running {word} of a list, starting from {start}, one for each number.",
        body=f"result = []\ntotal = {start}\nfor x in numbers:\n    total = {code}\n    result.append(total)\nreturn result",
        right=lambda xs: list(itertools.accumulate(xs, step, initial=start))[1:],
        draw=lambda rng: (numbers(rng, most=6),),
        rename=dict(numbers=LISTS, result=RESULTS, total="total state acc", x="x n value"),
    )


_KEYS = {
    "their absolute values": ("abs(x)", lambda x, k: max(x, -x)),
    "their remainders modulo {k}": ("x % {k}", lambda x, k: divmod(x, k)[1]),
    "their distance from {k}": ("abs(x - {k})", lambda x, k: max(x - k, k - x)),
    "their size": ("x", lambda x, k: x),
    "their last digits": ("abs(x) % 10", lambda x, k: int(str(x)[-1])),
}
_SORTS = {
    "insertion": """\
result = []
for x in numbers:
    place = len(result)
    while place > 0 and key(result[place - 1]) {after} key(x):
        place -= 1
    result.insert(place, x)
return result""",
    "bubble": """\
result = list(numbers)
for end in range(len(result), 1, -1):
    for i in range(end - 1):
        if key(result[i]) {after} key(result[i + 1]):
            result[i], result[i + 1] = result[i + 1], result[i]
return result""",
    "merge": """\
def merge_sort(part):
    if len(part) < 2:
        return part
    middle = len(part) // 2
    left, right = merge_sort(part[:middle]), merge_sort(part[middle:])
    merged = []
    while left and right:
        first = right if key(left[0]) {after} key(right[0]) else left
        merged.append(first.pop(0))
    return merged + left + right

return merge_sort(list(numbers))""",
}


def sorting(rng: random.Random) -> Draft:
    """A stable sort by a key, ascending or descending."""
    name, code = rng.choice(list(_SORTS.items()))
    phrase, (key, right) = rng.choice(list(_KEYS.items()))
    k, down = rng.randint(2, 7), rng.random() < 0.5
    helper = f"def key(x):\n    return {key.format(k=k)}\n\n"
    return Draft(
        names=(f"{name}_sort", "sort_by_key", "ordered", "arrange"),
        statement=f"Sorts a list by {phrase.format(k=k)}, from the {'largest' if down else 'smallest'} on, with {name} "
        "sort; equals keep their order.",
        body=helper + code.format(after="<" if down else ">"),
        right=lambda xs: sorted(xs, key=lambda x: (-1 if down else 1) * right(x, k)),
        draw=lambda rng: (numbers(rng, -15, 15),),
        rename=dict(numbers=LISTS, result=RESULTS, key="key rank measure"),
    )


def search(rng: random.Random) -> Draft:
    left = rng.random() < 0.5
    missing = rng.choice((-1, None))
    test = "numbers[middle] < target" if left else "numbers[middle] <= target"
    at = "low" if left else "low - 1"
    guard = "low < len(numbers)" if left else "low > 0"
    return Draft(
        names=("binary_search", "find_sorted", f"{'first' if left else 'last'}_place"),
        parameters=("numbers", "target"),
        statement=f"Returns the {'first' if left else 'last'} index of target in a sorted list, {missing} if it is not "
        "there, by halving.",
        body=f"low, high = 0, len(numbers)\nwhile low < high:\n    middle = (low + high) // 2\n    if {test}:\n"
        f"        low = middle + 1\n    else:\n        high = middle\nif {guard} and numbers[{at}] == target:\n"
        f"    return {at}\nreturn {missing}",
        right=lambda xs, t: next(
            (i for i in (range(len(xs)) if left else reversed(range(len(xs)))) if xs[i] == t),
            missing,
        ),
        draw=lambda rng: (sorted(numbers(rng, 0, 9)), rng.randint(0, 9)),
        kinds=("list[int]", "int", "int | None" if missing is None else "int"),
        rename=dict(numbers=LISTS, low="low lo a", high="high hi b", middle="middle mid"),
    )


def pairs(rng: random.Random) -> Draft:
    word, code, test = rng.choice(
        (
            ("sum to {k}", "x + y == {k}", lambda x, y, k: x == k - y),
            ("differ by {k}", "abs(x - y) == {k}", lambda x, y, k: k in (x - y, y - x)),
            ("have a product above {k}", "x * y > {k}", lambda x, y, k: not x * y <= k),
        )
    )
    k = rng.randint(0, 12)
    return Draft(
        names=("count_pairs", "number_of_pairs", "matching_pairs"),
        statement=f"Counts the pairs of places in a list whose numbers {word.format(k=k)}.",
        body=f"result = 0\nfor i, x in enumerate(numbers):\n    for y in numbers[i + 1:]:\n        if {code.format(k=k)}:\n"
        "            result += 1\nreturn result",
        right=lambda xs: sum(test(x, y, k) for x, y in itertools.combinations(xs, 2)),
        draw=lambda rng: (numbers(rng, 0, 9),),
        kinds=("list[int]", "int"),
        rename=dict(numbers=LISTS, result="count total found", x="x a", y="y b"),
    )


def matrix(rng: random.Random) -> Draft:
    phrase, body, right = rng.choice(
        (
            ("Transposes a matrix.", "return [list(column) for column in zip(*rows)]",
             lambda m: [[row[j] for row in m] for j in range(len(m[0]))]),
            ("Returns the sum of each row of a matrix.",
             "result = []\nfor row in rows:\n    result.append(sum(row))\nreturn result",
             lambda m: [-sum(-x for x in row) for row in m]),
            ("Returns the largest number of each column of a matrix.",
             "result = list(rows[0])\nfor row in rows[1:]:\n    for j, x in enumerate(row):\n        if x > result[j]:\n"
             "            result[j] = x\nreturn result",
             lambda m: [sorted(column)[-1] for column in zip(*m, strict=True)]),
            ("Turns a matrix by 90 degrees clockwise.", "return [list(column)[::-1] for column in zip(*rows)]",
             lambda m: [[row[j] for row in reversed(m)] for j in range(len(m[0]))]),
        )
    )  # fmt: skip

    def draw(rng):
        width = rng.randint(1, 4)
        return ([[rng.randint(-9, 9) for _ in range(width)] for _ in range(rng.randint(1, 4))],)

    return Draft(
        names=("matrix_operation", "on_rows", "grid"),
        parameters=("rows",),
        statement=phrase,
        body=body,
        right=right,
        draw=draw,
        kinds=("list[list[int]]", "list"),
        rename=dict(rows="rows matrix grid_rows", result=RESULTS),
    )


_LISTS_OF_LISTS = (chain, rotate, windows, accumulate, sorting)


def composed(rng: random.Random) -> Draft:
    """Two list problems in sequence: the second reads the result of the first."""
    parts: list[Draft] = []
    while len(parts) < 2:
        part = rng.choice(_LISTS_OF_LISTS)(rng)
        if part.kinds[-1] in ("list", "list[int]"):
            parts.append(part)
    first, second = parts
    helpers = "".join(
        f"def {name}({part.parameters[0]}):\n{textwrap.indent(part.body, '    ')}\n\n"
        for name, part in (("first", first), ("second", second))
    )
    return Draft(
        names=("two_steps", "first_then_second", "pipeline"),
        parameters=("given",),
        statement=f"Does two things, one after the other. {first.statement} {second.statement}",
        body=f"{helpers}return second(first(given))",
        right=lambda xs: second.right(first.right(xs)),
        rename=dict(
            given="given source values_in", first="first step_one", second="second step_two"
        ),
    )


FAMILIES = (chain, rotate, chunks, windows, accumulate, sorting, search, pairs, matrix, composed)
# Families that do not run out of new problems.
OPEN_ENDED = (chain, composed)
