"""Families of problems on strings, and on parsing them."""

import collections
import itertools
import random
import re
import string

from espalier.data.code_mix.synthetic.draft import RESULTS, Draft, sentence, word

_TEXT = dict(text="text s line string", result=RESULTS, c="c char letter")


def _draft(names, statement, body, right, draw, returned="str", rename=None) -> Draft:
    return Draft(names, statement, body, right, rename or _TEXT, ("text",), draw, ("str", returned))


def caesar(rng: random.Random) -> Draft:
    k = rng.randint(1, 25)
    low = string.ascii_lowercase
    table = str.maketrans(low, low[k:] + low[:k])
    return _draft(
        ("shift_letters", "caesar", "encode"),
        f"Moves each lower-case letter by {k} in the alphabet, from z on to a; other characters stay.",
        "result = ''\nfor c in text:\n    if 'a' <= c <= 'z':\n"
        f"        c = chr((ord(c) - ord('a') + {k}) % 26 + ord('a'))\n    result += c\nreturn result",
        lambda s: s.translate(table),
        lambda rng: (word(rng, low + "XY ,.", 12),),
    )


def counting(rng: random.Random) -> Draft:
    letters = rng.choice(("aeiou", "abc", "bcd", "aei", "ou"))
    return _draft(
        ("count_letters", f"count_{letters}", "occurrences"),
        f"Counts the characters of a string that are in {letters!r}.",
        f"result = 0\nfor c in text:\n    if c in {letters!r}:\n        result += 1\nreturn result",
        lambda s: sum(map(s.count, letters)),
        lambda rng: (sentence(rng),),
        "int",
    )


def run_lengths(rng: random.Random) -> Draft:
    order = rng.choice(("letter and count", "count and letter"))
    piece = "c + str(count)" if order.startswith("letter") else "str(count) + c"
    code = piece.replace("c ", "text[start] ").replace("+ c", "+ text[start]")
    code = code.replace("count", "end - start")

    def right(s):
        runs = [(c, str(len(list(run)))) for c, run in itertools.groupby(s)]
        return "".join(c + n if order.startswith("letter") else n + c for c, n in runs)

    return _draft(
        ("run_lengths", "compress", "encode_runs"),
        f"Writes each run of equal characters as its {order}.",
        "result, start = '', 0\nwhile start < len(text):\n    end = start\n"
        "    while end < len(text) and text[end] == text[start]:\n        end += 1\n"
        f"    result += {code}\n    start = end\nreturn result",
        right,
        lambda rng: (word(rng, "aab", 9),),
        rename=dict(_TEXT, start="start i", end="end j"),
    )


def reversal(rng: random.Random) -> Draft:
    phrase, body, right = rng.choice(
        (
            ("Reverses the order of the words of a text.", "return ' '.join(text.split()[::-1])",
             lambda s: " ".join(reversed(s.split(" ")))),
            ("Reverses each word of a text, in place.",
             "result = []\nfor part in text.split(' '):\n    result.append(part[::-1])\nreturn ' '.join(result)",
             lambda s: " ".join(reversed(s[::-1].split(" ")))),
            ("Reverses a string by recursion.", "if not text:\n    return ''\nreturn {name}(text[1:]) + text[0]",
             lambda s: s[::-1]),
        )
    )  # fmt: skip
    return _draft(
        ("reverse_text", "reversed_words", "turn_around"),
        phrase,
        body,
        right,
        lambda rng: (sentence(rng),),
    )


def palindrome(rng: random.Random) -> Draft:
    ignored = rng.choice((" ", " ,", " .!"))
    return _draft(
        ("is_palindrome", "reads_both_ways", "check_mirror"),
        f"Tells whether a text reads the same from both ends, characters in {ignored!r} left out.",
        f"kept = [c for c in text if c not in {ignored!r}]\ni, j = 0, len(kept) - 1\nwhile i < j:\n"
        "    if kept[i] != kept[j]:\n        return False\n    i, j = i + 1, j - 1\nreturn True",
        lambda s: (t := "".join(c for c in s if c not in ignored)) == t[::-1],
        lambda rng: (
            (lambda w: rng.choice((w + w[::-1], w + " " + w[-2::-1], w)))(word(rng, "ab c", 5)),
        ),
        "bool",
        dict(text=_TEXT["text"], kept="kept cleaned", i="i left", j="j right"),
    )


def longest(rng: random.Random) -> Draft:
    word_, sign = rng.choice((("longest", ">"), ("shortest", "<")))
    tie = rng.choice(("first", "last"))
    code = sign if tie == "first" else f"{sign}="

    def right(s):
        words = s.split()
        best = (max if word_ == "longest" else min)(map(len, words))
        return [w for w in words if len(w) == best][0 if tie == "first" else -1]

    return _draft(
        (f"{word_}_word", f"find_{word_}", "pick_word"),
        f"Returns the {word_} word of a text, the {tie} of equals.",
        "words = text.split()\nresult = words[0]\nfor part in words[1:]:\n"
        f"    if len(part) {code} len(result):\n        result = part\nreturn result",
        right,
        lambda rng: (sentence(rng),),
        rename=dict(_TEXT, words="words parts", part="part candidate"),
    )


def case(rng: random.Random) -> Draft:
    k = rng.randint(2, 4)
    sep = rng.choice("_-. ")
    kind = rng.choice(("camel", "every"))
    if kind == "camel":
        return _draft(
            ("to_camel_case", "camel", "join_words"),
            f"Joins parts separated by {sep!r} to one name, all but the first with a capital.",
            f"first, *rest = text.split({sep!r})\nreturn first + ''.join(part.capitalize() for part in rest)",
            lambda s: re.sub(f"{re.escape(sep)}(.)", lambda m: m[1].upper(), s),
            lambda rng: (sep.join(word(rng) for _ in range(rng.randint(1, 4))),),
            rename=dict(text=_TEXT["text"], part="part piece", rest="rest others"),
        )
    return _draft(
        ("raise_letters", "every_nth_upper", "capitals"),
        f"Makes each {k}th character of a string a capital, counted from 1.",
        f"result = ''\nfor i, c in enumerate(text, 1):\n    result += c.upper() if i % {k} == 0 else c\nreturn result",
        lambda s: "".join(
            s[i : i + k - 1] + s[i + k - 1 : i + k].upper() for i in range(0, len(s), k)
        ),
        lambda rng: (word(rng, most=11),),
    )


def balanced(rng: random.Random) -> Draft:
    kinds = rng.sample(("()", "[]", "{}", "<>"), rng.randint(1, 3))
    closing = {pair[1]: pair[0] for pair in kinds}

    def right(s):
        brackets = "".join(c for c in s if c in "".join(kinds))
        while any(pair in brackets for pair in kinds):
            for pair in kinds:
                brackets = brackets.replace(pair, "")
        return not brackets

    return _draft(
        ("is_balanced", "brackets_match", "well_formed"),
        f"Tells whether the brackets {' '.join(kinds)} of a text are closed in the right order.",
        f"opened = []\npairs = {closing!r}\nfor c in text:\n    if c in pairs.values():\n        opened.append(c)\n"
        "    elif c in pairs and (not opened or opened.pop() != pairs[c]):\n        return False\nreturn not opened",
        right,
        lambda rng: (
            word(rng, "".join(kinds) * 2 + "a", 6) if rng.random() < 0.6 else "".join(kinds),
        ),
        "bool",
        dict(text=_TEXT["text"], c=_TEXT["c"], opened="opened stack", pairs="pairs partner"),
    )


def settings(rng: random.Random) -> Draft:
    between, equals = rng.choice((";", ",", "&", "|")), rng.choice(("=", ":"))
    number = rng.random() < 0.5
    value = "int(value)" if number else "value"
    return _draft(
        ("parse_settings", "read_pairs", "to_dict"),
        f"Parses a text such as 'a{equals}1{between}b{equals}2' into a dictionary of "
        f"{'numbers' if number else 'strings'}; a later key wins.",
        f"result = {{}}\nif not text:\n    return result\nfor part in text.split({between!r}):\n"
        f"    name, value = part.split({equals!r})\n    result[name] = {value}\nreturn result",
        lambda s: {
            k: int(v) if number else v for k, v in re.findall(rf"(\w+){re.escape(equals)}(\d+)", s)
        },
        lambda rng: (
            between.join(
                f"{rng.choice('abc')}{equals}{rng.randint(0, 99)}" for _ in range(rng.randint(0, 4))
            ),
        ),
        "dict",
        dict(_TEXT, part="part field", name="name key", value="value v"),
    )


def durations(rng: random.Random) -> Draft:
    units = rng.choice(
        ({"h": 60, "m": 1}, {"h": 3600, "m": 60, "s": 1}, {"d": 24, "h": 1}, {"w": 7, "d": 1})
    )
    small = min(units, key=units.__getitem__)
    return _draft(
        ("parse_duration", "total_time", "read_duration"),
        f"Returns how many {small} a duration such as '2{next(iter(units))}15{small}' is, with "
        + ", ".join(f"1{unit} = {size}{small}" for unit, size in units.items() if size > 1)
        + ".",
        f"units = {units!r}\nresult, digits = 0, ''\nfor c in text:\n    if c.isdigit():\n        digits += c\n"
        "    else:\n        result += int(digits) * units[c]\n        digits = ''\nreturn result",
        lambda s: sum(int(n) * units[u] for n, u in re.findall(r"(\d+)([a-z])", s)),
        lambda rng: (
            "".join(f"{rng.randint(0, 59)}{unit}" for unit in units if rng.random() < 0.8),
        ),
        "int",
        dict(_TEXT, units="units sizes", digits="digits number"),
    )


def expression(rng: random.Random) -> Draft:
    operators = rng.choice(("+-", "+*", "+-*"))
    values = {"+": "left + right", "-": "left - right", "*": "left * right"}
    cases = "".join(
        f"    {'el' if i else ''}if parts[i] == {op!r}:\n        left = {values[op]}\n"
        for i, op in enumerate(operators)
    )

    def right(s):
        total, *rest = re.findall(r"\d+|[-+*]", s)
        total = int(total)
        for op, n in zip(rest[::2], rest[1::2], strict=True):
            total = {"+": total.__add__, "-": total.__sub__, "*": total.__mul__}[op](int(n))
        return total

    return _draft(
        ("evaluate", "calculate", "compute_line"),
        f"Computes a text such as '3 {operators[0]} 4 {operators[1]} 5' from left to right, without precedence.",
        "parts = text.split()\nleft = int(parts[0])\nfor i in range(1, len(parts), 2):\n    right = int(parts[i + 1])\n"
        f"{cases}return left",
        right,
        lambda rng: (
            " ".join(
                [str(rng.randint(0, 9))]
                + [f"{rng.choice(operators)} {rng.randint(0, 9)}" for _ in range(3)]
            ),
        ),
        "int",
        dict(text=_TEXT["text"], parts="parts tokens", left="left total acc"),
    )


def letters(rng: random.Random) -> Draft:
    most = rng.random() < 0.5
    return _draft(
        ("letter_counts", "frequencies", "count_each"),
        f"Returns each letter of a text with its count, {'the most frequent' if most else 'in alphabetic order'} first"
        + (
            ", equals in alphabetic order; spaces are left out."
            if most
            else "; spaces are left out."
        ),
        "result = {}\nfor c in text:\n    if c != ' ':\n        result[c] = result.get(c, 0) + 1\n"
        f"return sorted(result.items(){', key=lambda pair: (-pair[1], pair[0])' if most else ''})",
        lambda s: sorted(
            collections.Counter(s.replace(" ", "")).items(),
            key=lambda p: (-p[1] if most else 0, p[0]),
        ),
        lambda rng: (sentence(rng, 3),),
        "list",
    )


FAMILIES = (caesar, counting, run_lengths, reversal, palindrome, longest, case, balanced)
FAMILIES += (settings, durations, expression, letters)
