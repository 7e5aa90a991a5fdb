"""Win rates with their intervals, and measures of the judge's biases, as a table and as bars.

Shares have 95 % intervals over prompts by Wilson (launch/plots/intervals.py), which are sensible for few prompts: of ten losses
of ten, the share of wins is 0 to 28 %.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.evaluate.judges.answers import System
from espalier.launch.evaluate.judges.asking import TIE, A, B, Outcome, Pair
from espalier.launch.plots import intervals

_RATES = ("win", "tie", "loss", "win - loss", "judged", "invalid")
_BEHIND = ("same in both orders", "position bias", "wins of the longer", "rate at equal length")
_BY_LANGUAGE = ("win", "tie", "loss", "wins and half ties", "at equal length", "judged", "invalid")
_LENGTHS = ("answers", "empty", "words, mean", "median", "characters, mean", "median")
_COLOURS = {"win": "#2a6f97", "tie": "#c9ced3", "loss": "#d1603d"}
_NEWTON_STEPS = 100


def print_tables(summary: Mapping[str, Any]) -> None:
    """Prints win rates and the judge's biases, a row for each pair of systems, and lengths by system."""
    from rich.console import Console

    rates = table_of("win rates in %, with 95 % intervals over prompts", ("a", "b"), _RATES)
    behind = table_of("the judge, in %", ("a", "b"), _BEHIND)
    for pair in summary["pairs"]:
        names = (pair["a"], pair["b"])
        shares = (cell(pair[name]) for name in ("win", "tie", "loss"))
        counts = (f"{_judged(pair):,}", f"{pair['counts']['invalid']:,}")
        rates.add_row(*names, *shares, cell(pair["difference"], sign="+"), *counts)
        bias = cell(pair["position_bias"], sign="+")
        cells = (cell(pair["longer_wins"]), cell(pair["length_controlled"]))
        behind.add_row(*names, cell(pair["consistency"]), bias, *cells)
    lengths = table_of("lengths of answers", ("system",), _LENGTHS)
    for name, system in summary["systems"].items():
        sizes = [
            system[unit][kind] for unit in ("words", "characters") for kind in ("mean", "median")
        ]
        numbers = (f"{size:,.1f}" for size in sizes)
        lengths.add_row(name, f"{system['answers']:,}", f"{system['empty']:,}", *numbers)
    console = Console(width=160, markup=False)
    for table in (rates, behind, lengths):
        console.print(table)


def print_languages(summaries: Sequence[Mapping[str, Any]]) -> None:
    """Prints the win rates of each two systems by language, as `shares.by_language` has them."""
    from rich.console import Console

    console = Console(width=160, markup=False)
    for pair in summaries:
        title = f"{pair['a']} against {pair['b']}: win rates in %, with 95 % intervals over prompts"
        table = table_of(title, ("language",), _BY_LANGUAGE)
        for code, one in pair["languages"].items():
            shares = (cell(one[x]) for x in ("win", "tie", "loss", "rate", "length_controlled"))
            table.add_row(code, *shares, f"{_judged(one):,}", f"{one['counts']['invalid']:,}")
        if mean := pair["mean"]:
            means = (f"{100 * mean[name]:.1f}" for name in ("win", "tie", "loss", "rate"))
            table.add_section()
            table.add_row("mean", *means, "", "", f"worst: {pair['worst']}")
        console.print(table)


def print_opponents(summaries: Sequence[Mapping[str, Any]]) -> None:
    """Prints a row for each system, with its rates against each opponent and their mean, of `against`."""
    from rich.console import Console

    title = "wins and half of the ties against each opponent in %, with 95 % intervals over prompts"
    names = [*summaries[0]["opponents"], "mean"]
    table = table_of(title, ("system",), [*names, "prompts of the mean"])
    for one in summaries:
        rates = (cell(share) for share in [*one["opponents"].values(), one["mean"]])
        table.add_row(one["system"], *rates, f"{one['prompts']:,}")
    Console(width=max(160, 40 + 22 * len(names)), markup=False).print(table)


def table_of(title: str, names: Sequence[str], numbers: Sequence[str]) -> Any:
    """Returns a table with columns of names and columns of numbers."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _judged(pair: Mapping[str, Any]) -> int:
    return sum(pair["counts"][name] for name in ("win", "loss", "tie"))


def cell(share: Mapping[str, float] | None, *, sign: str = "") -> str:
    """Returns a share and its interval in per cent."""
    if share is None:
        return "-"
    value, low, high = (f"{100 * share[name]:{sign}.1f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def plot(summary: Mapping[str, Any], path: pathlib.Path) -> None:
    """Writes a PNG with a stacked bar of wins, ties and losses for each pair of systems."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    pairs = [pair for pair in summary["pairs"] if pair["win"] is not None]
    height = 1.5 + 0.75 * max(len(pairs), 1)
    figure = Figure(figsize=(9.5, height), layout="constrained")
    axes = figure.subplots()
    for y, pair in enumerate(pairs):
        start = 0.0
        for name in ("win", "tie", "loss"):
            width = 100 * pair[name]["value"]
            axes.barh(y, width, left=start, height=0.62, color=_COLOURS[name])
            if width >= 4:
                colour = "black" if name == "tie" else "white"
                place = (start + width / 2, y)
                axes.annotate(f"{width:.1f}", place, ha="center", va="center", color=colour)
            start += width
        axes.annotate(
            f"{cell(pair['difference'], sign='+')}\n{_judged(pair):,} prompts",
            (1.01, y),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(pairs)), [f"{pair['a']}\nagainst {pair['b']}" for pair in pairs])
    axes.set_ylim(max(len(pairs), 1) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of prompts, %")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    labels = {"win": "first preferred", "tie": "tie", "loss": "second preferred"}
    handles = [Patch(color=_COLOURS[name], label=label) for name, label in labels.items()]
    axes.legend(handles=handles, ncols=3, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    axes.annotate(
        "win - loss, 95 %", (1.01, 1.02), xycoords="axes fraction", va="bottom", fontsize=9
    )
    figure.savefig(path, dpi=140)


def plot_languages(summaries: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Writes a PNG with the rate of the first system by language, a panel for each two systems."""
    from matplotlib.figure import Figure

    most = max(len(pair["languages"]) for pair in summaries)
    size = (1.2 + 3.6 * len(summaries), 1.4 + 0.26 * most)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(summaries), squeeze=False)[0]
    for axes, pair in zip(panels, summaries, strict=True):
        rates = {code: one["rate"] for code, one in pair["languages"].items() if one["rate"]}
        order = sorted(rates, key=lambda code: rates[code]["value"])
        for y, code in enumerate(order):
            low, value, high = (100 * rates[code][name] for name in ("low", "value", "high"))
            axes.plot([low, high], [y, y], color=_COLOURS["win"], lw=1.5)
            axes.plot(value, y, "o", color=_COLOURS["win"], ms=5)
        axes.axvline(50, color="#777777", lw=0.8, ls=":")
        if pair["mean"]:
            axes.axvline(
                100 * pair["mean"]["rate"], color=_COLOURS["loss"], lw=1, label="mean of languages"
            )
            axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
        axes.set_yticks(range(len(order)), order, fontsize=8)
        axes.set_ylim(-0.6, max(len(order), 1) - 0.4)
        axes.set_xlim(0, 100)
        axes.set_xlabel(f"{pair['a']} against {pair['b']}:\nwins and half of the ties, %")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
    figure.savefig(path, dpi=140)


def pair_summary(pairs: Sequence[Pair], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Summarises the outcomes of the pairs of two systems.

    Returns:
      'a', 'b': names of the systems.
      'counts': win, loss and tie of the first system, which add up to the judged pairs; identical (also among the
        ties); invalid (in no share).
      The others are {'value', 'low', 'high'}, or None without judged pairs:
      'win', 'loss', 'tie': shares; 'difference': win minus loss; 'rate': wins and half of the ties.
      'consistency': share of pairs with the same verdict in both orders, of pairs asked in both orders.
      'position_bias': from -1 (always prefers the last answer shown) to 1 (always the first), of the same pairs.
      'longer_wins': share of wins of the longer answer, among decided pairs of unequal lengths.
      'length_controlled': see `length_controlled`.
    """
    judged = [(p, o) for p, o in zip(pairs, outcomes, strict=True) if o.verdict is not None]
    verdicts = [outcome.verdict for _, outcome in judged]
    won, lost, tied = (np.array([v == kind for v in verdicts], bool) for kind in (A, B, TIE))
    same = [o.consistent for _, o in judged if o.consistent is not None]
    biases = [o.bias for _, o in judged if o.bias is not None]
    longer = [
        (len(p.a) > len(p.b)) == (o.verdict == A)
        for p, o in judged
        if o.verdict != TIE and len(p.a) != len(p.b)
    ]
    return {
        "a": pairs[0].systems[0],
        "b": pairs[0].systems[1],
        "counts": {
            **{name: int(x.sum()) for name, x in (("win", won), ("loss", lost), ("tie", tied))},
            "identical": sum(o.identical for _, o in judged),
            "invalid": len(outcomes) - len(judged),
        },
        "win": _interval(won),
        "loss": _interval(lost),
        "tie": _interval(tied),
        "difference": _interval(won.astype(int) - lost.astype(int), least=-1),
        "rate": _interval(won + 0.5 * tied),
        "consistency": _interval(same),
        "position_bias": _interval(biases, least=-1),
        "longer_wins": _interval(longer),
        "length_controlled": length_controlled(
            won + 0.5 * tied, np.array([len(p.a) - len(p.b) for p, _ in judged], float)
        ),
    }


def _interval(
    values: Sequence[float] | np.ndarray, *, least: float = 0.0
) -> dict[str, float] | None:
    return intervals.bounded(values, least=least) if len(values) else None


def length_controlled(rates: np.ndarray, longer: np.ndarray) -> dict[str, float] | None:
    """Returns the rate of the first system, were its answers as long as the other's (after arXiv 2404.04475).

    The logit of a prompt's rate is a constant plus a slope times tanh of the difference in length, in standard deviations.
    The slope has a normal prior of unit variance. The interval is of 95 %, by the robust covariance over prompts.

    Args:
      rates: per prompt 1 for a win, 1/2 for a tie, 0 for a loss, [N].
      longer: by how many characters the first system's answer is longer, [N].

    Returns:
      {'value', 'low', 'high', 'slope'}; None if all prompts have the same outcome, or there is one prompt.
    """
    if len(rates) < 2 or np.ptp(rates) == 0:
        return None
    deviation = float(longer.std())
    lengths_N = np.tanh(longer / deviation) if deviation else np.zeros_like(longer)
    design_N2 = np.stack([np.ones_like(lengths_N), lengths_N], axis=1)
    prior = np.diag([0.0, 1.0])
    weights_2 = np.zeros(2)
    for _ in range(_NEWTON_STEPS):
        shares_N = 1 / (1 + np.exp(-design_N2 @ weights_2))
        slopes_2 = design_N2.T @ (rates - shares_N) - prior @ weights_2
        curvature = (design_N2 * (shares_N * (1 - shares_N))[:, None]).T @ design_N2 + prior
        change_2 = np.linalg.solve(curvature, slopes_2)
        weights_2 = weights_2 + np.clip(change_2, -1.0, 1.0)
        if np.abs(change_2).max() < 1e-10:
            break
    errors_N2 = design_N2 * (rates - shares_N)[:, None]
    inverse = np.linalg.inv(curvature)
    spread = float(np.sqrt((inverse @ (errors_N2.T @ errors_N2) @ inverse)[0, 0]))
    logits = weights_2[0] + spread * intervals.Z * np.array([0.0, -1.0, 1.0])
    value, low, high = (1 / (1 + np.exp(-logits))).tolist()
    return {"value": value, "low": low, "high": high, "slope": float(weights_2[1])}


def by_language(
    pairs: Sequence[Pair], outcomes: Sequence[Outcome], languages: Sequence[str]
) -> dict[str, Any]:
    """Summarises the outcomes of the pairs of two systems by language.

    Args:
      pairs, outcomes: the compared answers of two systems, and what the judge said of each pair.
      languages: of each pair, as codes.

    Returns:
      'a', 'b': names of the systems; 'languages': code -> `pair_summary`, in order of the codes; 'mean': {'win', 'loss',
      'tie', 'rate'} averaged over languages, as if each had as many prompts; 'worst': the language of the lowest rate.
      The last two leave out languages without a judged pair, and are None if there is none.
    """
    summaries = {
        code: pair_summary(
            [pair for pair, one in zip(pairs, languages, strict=True) if one == code],
            [outcome for outcome, one in zip(outcomes, languages, strict=True) if one == code],
        )
        for code in sorted(set(languages))
    }
    judged = {code: one for code, one in summaries.items() if one["rate"] is not None}
    names = ("win", "loss", "tie", "rate")
    return {
        "a": pairs[0].systems[0],
        "b": pairs[0].systems[1],
        "languages": summaries,
        "mean": {n: float(np.mean([one[n]["value"] for one in judged.values()])) for n in names}
        if judged
        else None,
        "worst": min(judged, key=lambda code: judged[code]["rate"]["value"]) if judged else None,
    }


def against(
    pairs: Sequence[Pair], outcomes: Sequence[Outcome], *, prompts: int, opponents: int
) -> list[dict[str, Any]]:
    """Summarises the outcomes of systems against fixed opponents.

    Args:
      pairs, outcomes: of each system, of each opponent, of each prompt, in this order.

    Returns:
      Of each system its name as 'system'; 'opponents': name -> {'value', 'low', 'high'} of wins and half of the ties, None
      without a judged pair; 'prompts': number of prompts that are judged against all opponents; 'mean': of these prompts'
      rates, each averaged over opponents before the interval, since opponents answer the same prompts; None without any.
    """
    values = {A: 1.0, TIE: 0.5, B: 0.0, None: np.nan}
    scores_SOP = np.array([values[o.verdict] for o in outcomes]).reshape(-1, opponents, prompts)
    of_pairs = iter(pairs[::prompts])
    summaries = []
    for scores_OP in scores_SOP:
        named = [next(of_pairs).systems for _ in range(opponents)]
        whole_P = scores_OP.mean(0)
        whole_P = whole_P[~np.isnan(whole_P)]
        summaries.append(
            {
                "system": named[0][0],
                "opponents": {
                    opponent: _interval(scores_P[~np.isnan(scores_P)])
                    for (_, opponent), scores_P in zip(named, scores_OP, strict=True)
                },
                "prompts": len(whole_P),
                "mean": _interval(whole_P),
            }
        )
    return summaries


def system_summary(system: System) -> dict[str, Any]:
    """Returns lengths of a system's answers, because a judge may prefer longer ones only for their length."""

    def lengths(size: Callable[[str], int]) -> dict[str, float]:
        sizes = [size(answer.text) for answer in system.answers]
        return {"mean": round(float(np.mean(sizes)), 2), "median": float(np.median(sizes))}

    return {
        "file": system.path,
        "answers": len(system.answers),
        "empty": sum(not answer.text.strip() for answer in system.answers),
        "characters": lengths(len),
        "words": lengths(lambda text: len(text.split())),
    }
