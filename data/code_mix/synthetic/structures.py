"""Families of problems on numbers, dictionaries and nested lists, the last by recursion."""

import collections
import functools
import math
import random

from espalier.data.code_mix.synthetic.draft import LISTS, RESULTS, Draft, numbers, word

_N = dict(n="n number value", result=RESULTS)


def _number(names, statement, body, right, *, low=0, high=60, returned="int", rename=None) -> Draft:
    return Draft(
        names,
        statement,
        body,
        right,
        rename or _N,
        parameters=("n",),
        draw=lambda rng: (rng.randint(low, high),),
        kinds=("int", returned),
    )


def multiples(rng: random.Random) -> Draft:
    a, b = rng.sample(range(2, 9), 2)
    both = rng.choice(("or", "and"))
    return _number(
        ("sum_of_multiples", "add_multiples", "total_below"),
        f"Returns the sum of the numbers from 1 up to but not n that are multiples of {a} {both} of {b}.",
        f"result = 0\nfor i in range(1, n):\n    if i % {a} == 0 {both} i % {b} == 0:\n        result += i\nreturn result",
        lambda n: sum(
            {*range(a, n, a)} | {*range(b, n, b)}
            if both == "or"
            else {*range(a, n, a)} & {*range(b, n, b)}
        ),
    )


def digits(rng: random.Random) -> Draft:
    base = rng.choice((2, 3, 5, 8, 10, 16))
    quantity, code, right = rng.choice(
        (("sum", "result + digit", sum), ("number", "result + 1", len), ("largest", "max(result, digit)", max))
    )  # fmt: skip

    def all_digits(n):
        return [n // base**i % base for i in range(40) if base**i <= n] or [0]

    body = f"result = 0\nwhile n > 0:\n    digit = n % {base}\n    result = {code}\n    n //= {base}\nreturn result"
    return _number(
        ("digits", f"{quantity}_of_digits", "digit_value"),
        f"Returns the {quantity} of the digits of a number above 0 in base {base}.",
        body,
        lambda n: right(all_digits(n)),
        low=1,
        high=999,
        rename=dict(_N, digit="digit d rest"),
    )


def base(rng: random.Random) -> Draft:
    b = rng.choice((2, 3, 4, 5, 7, 8))

    def right(n):
        return right(n // b) + str(n % b) if n >= b else str(n)

    return _number(
        ("to_base", f"in_base_{b}", "convert"),
        f"Writes a number that is not negative in base {b}.",
        f"if n == 0:\n    return '0'\nresult = ''\nwhile n > 0:\n    result = str(n % {b}) + result\n    n //= {b}\n"
        "return result",
        right,
        high=999,
        returned="str",
    )


def primes(rng: random.Random) -> Draft:
    k = rng.randint(0, 20)
    return _number(
        ("primes", "primes_between", "list_primes"),
        f"Returns the primes above {k} that are at most n.",
        f"result = []\nfor i in range(max(2, {k + 1}), n + 1):\n    divisor = 2\n    while divisor * divisor <= i and i % divisor:\n"
        "        divisor += 1\n    if divisor * divisor > i:\n        result.append(i)\nreturn result",
        lambda n: [i for i in range(2, n + 1) if i > k and all(i % d for d in range(2, i))],
        high=90,
        returned="list[int]",
        rename=dict(_N, divisor="divisor d factor"),
    )


def recurrence(rng: random.Random) -> Draft:
    a, b, p, q = (rng.randint(0, 4) for _ in range(4))
    p, q = p or 1, q or 1

    @functools.cache
    def right(n):
        return (a, b)[n] if n < 2 else p * right(n - 1) + q * right(n - 2)

    loop = f"x, y = {a}, {b}\nfor _ in range(n):\n    x, y = y, {p} * y + {q} * x\nreturn x"
    recursive = f"if n == 0:\n    return {a}\nif n == 1:\n    return {b}\nreturn {p} * {{name}}(n - 1) + {q} * {{name}}(n - 2)"
    return _number(
        ("sequence", "recurrence", "term"),
        f"Returns f(n) with f(0) = {a}, f(1) = {b} and f(n) = {p} f(n - 1) + {q} f(n - 2).",
        rng.choice((loop, recursive)),
        right,
        high=12,
        rename=dict(n="n k index"),
    )


def steps(rng: random.Random) -> Draft:
    k = rng.choice((3, 5))
    divisor, add = 2, 1

    def right(n):
        count = 0
        while n > 1 and count < 30:
            n, count = (n // divisor if not n & 1 else k * n + add), count + 1
        return count

    return _number(
        ("count_steps", "steps_to_one", "chain_length"),
        f"Counts steps until a number above 0 is 1, at most 30: even ones are halved, others become {k} n + 1.",
        f"result = 0\nwhile n > 1 and result < 30:\n    if n % 2 == 0:\n        n //= 2\n    else:\n        n = {k} * n + 1\n"
        "    result += 1\nreturn result",
        right,
        low=1,
        rename=dict(_N, result="steps count result"),
    )


def divisors(rng: random.Random) -> Draft:
    quantity, code = rng.choice((("number", "1"), ("sum", "i"), ("sum of the squares", "i * i")))
    power = {"1": 0, "i": 1, "i * i": 2}[code]
    return _number(
        ("divisors", "over_divisors", "divisor_value"),
        f"Returns the {quantity} of the divisors of a number above 0.",
        f"result = 0\nfor i in range(1, n + 1):\n    if n % i == 0:\n        result += {code}\nreturn result",
        lambda n: sum(
            d**power
            for d in {e for i in range(1, math.isqrt(n) + 1) if not n % i for e in (i, n // i)}
        ),
        low=1,
        high=120,
    )


def common(rng: random.Random) -> Draft:
    quantity, last = rng.choice(
        (("greatest common divisor", "a"), ("least common multiple", "first * second // a"))
    )
    return Draft(
        names=("common", quantity.split()[0] + "_common", "euclid"),
        parameters=("first", "second"),
        statement=f"Returns the {quantity} of two numbers above 0, with Euclid's algorithm.",
        body=f"a, b = first, second\nwhile b:\n    a, b = b, a % b\nreturn {last}",
        right=math.gcd if last == "a" else math.lcm,
        draw=lambda rng: (rng.randint(1, 80), rng.randint(1, 80)),
        kinds=("int", "int", "int"),
        rename=dict(first="first m", second="second n"),
    )


def grouping(rng: random.Random) -> Draft:
    k = rng.randint(2, 4)
    feature, code, key = rng.choice(
        (("their length", "len(item)", len), ("their first letter", "item[0]", lambda w: w[:1]),
         (f"their length modulo {k}", f"len(item) % {k}", lambda w: divmod(len(w), k)[1]))
    )  # fmt: skip
    count = rng.random() < 0.5
    add = (
        "result[key] = result.get(key, 0) + 1"
        if count
        else "result.setdefault(key, []).append(item)"
    )

    def right(items):
        keys = [key(item) for item in items]
        return {
            group: keys.count(group) if count else [i for i in items if key(i) == group]
            for group in keys
        }

    return Draft(
        names=("group_words", "by_key", "collect"),
        parameters=("items",),
        statement=f"Returns a dictionary of words by {feature}: {'how many there are' if count else 'lists of them in order'}.",
        body=f"result = {{}}\nfor item in items:\n    key = {code}\n    {add}\nreturn result",
        right=right,
        draw=lambda rng: ([word(rng, most=4) for _ in range(rng.randint(0, 5))],),
        kinds=("list[str]", "dict"),
        rename=dict(items="items words", item="item w", key="key k", result=RESULTS),
    )


def merging(rng: random.Random) -> Draft:
    rule, code, pick = rng.choice(
        (("added", "result[key] + value", sum), ("reduced to the larger", "max(result[key], value)", max),
         ("reduced to the smaller", "min(result[key], value)", min))
    )  # fmt: skip

    def right(a, b):
        return {key: pick([d[key] for d in (a, b) if key in d]) for key in {**a, **b}}

    def draw(rng):
        return tuple(
            {c: rng.randint(-9, 9) for c in rng.sample("abcd", rng.randint(0, 4))} for _ in range(2)
        )

    return Draft(
        names=("merge", "merge_counts", "combined"),
        parameters=("first", "second"),
        statement=f"Merges two dictionaries of numbers; where both have a key, its values are {rule}.",
        body="result = dict(first)\nfor key, value in second.items():\n    if key in result:\n"
        f"        result[key] = {code}\n    else:\n        result[key] = value\nreturn result",
        right=right,
        draw=draw,
        kinds=("dict", "dict", "dict"),
        rename=dict(result=RESULTS, first="first left", second="second right", value="value v"),
    )


def inverting(rng: random.Random) -> Draft:
    k = rng.randint(-3, 5)
    return Draft(
        names=("invert", "keys_by_value", "swap"),
        parameters=("mapping",),
        statement=f"Returns the keys of each value of a dictionary, sorted, for values above {k}.",
        body=f"result = {{}}\nfor key, value in mapping.items():\n    if value > {k}:\n"
        "        result.setdefault(value, []).append(key)\nfor value in result:\n    result[value].sort()\nreturn result",
        right=lambda d: {
            v: sorted(key for key in d if d[key] == v) for v in d.values() if not v <= k
        },
        draw=lambda rng: (
            {c: rng.randint(-4, 9) for c in rng.sample("abcdef", rng.randint(0, 6))},
        ),
        kinds=("dict", "dict"),
        rename=dict(result=RESULTS, mapping="mapping table", key="key name", value="value v"),
    )


def _nested(rng: random.Random, depth: int = 3) -> list:
    return [
        _nested(rng, depth - 1) if depth and rng.random() < 0.35 else rng.randint(-9, 9)
        for _ in range(rng.randint(0, 4))
    ]


def _flat(items):
    stack, leaves = [items], []
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack.extend(reversed(item))
        else:
            leaves.append(item)
    return leaves


def nested(rng: random.Random) -> Draft:
    k = rng.randint(1, 3)
    phrase, start, inner, leaf, right = rng.choice(
        (("Flattens nested lists of numbers", "[]", "result + {name}(item)", "result + [item]", _flat),
         ("Adds up the numbers of nested lists", "0", "result + {name}(item)", "result + item", lambda x: sum(_flat(x))),
         ("Counts the numbers of nested lists", "0", "result + {name}(item)", "result + 1", lambda x: len(_flat(x))),
         (f"Counts the numbers above {k} of nested lists", "0", "result + {name}(item)", f"result + (item > {k})",
          lambda x: sum(not n <= k for n in _flat(x))),
         ("Returns how deep lists are nested, 1 if not at all", "1", "max(result, 1 + {name}(item))", "result",
          lambda x: max(str(x)[:i].count("[") - str(x)[:i].count("]") for i in range(1, len(str(x)) + 1))))
    )  # fmt: skip
    return Draft(
        names=("walk", "visit", "over_nested"),
        parameters=("items",),
        statement=f"{phrase}, by recursion.",
        body=f"result = {start}\nfor item in items:\n    if isinstance(item, list):\n        result = {inner}\n    else:\n"
        f"        result = {leaf}\nreturn result",
        right=right,
        draw=lambda rng: (_nested(rng),),
        kinds=("list", "list[int]" if start == "[]" else "int"),
        rename=dict(items="items tree data", item="item node x", result=RESULTS),
    )


def frequent(rng: random.Random) -> Draft:
    least = rng.randint(2, 3)
    return Draft(
        names=("frequent", "repeated", "often"),
        statement=f"Returns the numbers that are at least {least} times in a list, in order of their first place.",
        body="counts = {}\nfor x in numbers:\n    counts[x] = counts.get(x, 0) + 1\n"
        f"return [x for x, count in counts.items() if count >= {least}]",
        right=lambda xs: [x for x in collections.Counter(xs) if xs.count(x) > least - 1],
        draw=lambda rng: (numbers(rng, 0, 3),),
        rename=dict(numbers=LISTS, counts="counts seen", x="x n", count="count times"),
    )


FAMILIES = (multiples, digits, base, primes, recurrence, steps, divisors, common)
FAMILIES += (grouping, merging, inverting, nested, frequent)
