"""The report: what holds and what does not, as a page that people read and as JSON."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.preference import claims, figures, fits, results, rule, rule_claims, tables
from launch.papers.preference.arms import ARMS
from launch.papers.preference.results import Course
from launch.papers.shared import claim
from launch.papers.shared.claim import Claim

_DIGITS = 4
_HEAD = """\
# Likelihood over-optimisation: the paper's claims on a small language

[Understanding Likelihood Over-optimisation in Direct Alignment Algorithms, arXiv
2410.11677](https://arxiv.org/abs/2410.11677).
This page and its plots are written by

```
{command}
```

and never by hand. Each condition is judged in every seed, and on the means over seeds with 95 % intervals (Student's
t); those of the stopping rule on shares of all runs (Wilson's intervals, as if runs of a seed were independent). A claim
holds where all of them meet it. Claims in bold must hold at this scale too; the others are reported as
they come out.
"""
_SETUP = [
    "- *language*: prompts of three symbols and completions of at most twelve, of two languages of 244 symbols each. Texts of "
    "language A on a topic prefer six symbols; other documents are texts of language B, and 72 facts of language A. "
    "The quality of an answer to a topic is known: 0.8 for each different symbol that the topic prefers, -4 times the "
    "share of symbols outside A, -3 for each repeat, -0.5 without an end, and -4 for an empty answer (data/preference/topic_language.py).",
    "- *runs*: a decoder of 0.1 million parameters (2 layers of width 64) learns all documents, 1,500 updates. Two samples of "
    "it are judged 2,048 times by Bradley and Terry's model of their quality, six or seven times for each of 320 prompts, "
    "and 600 updates of 32 such pairs follow, about nine epochs, with DPO, IPO (sums over tokens) or SLiC's hinge (means "
    "over tokens; α weighs its regulariser, which is of sums), of several strengths and with an NLL term (a mean over "
    "tokens) of weight λ beside some. A sample that was cut without an end (3 % at most) is trained on with one. For comparison online DPO, RLOO, GRPO and PPO "
    "learn from the quality of 25,600 samples of their own (PPO in 800 updates, the others in 200); claims, fits and rates are not of them "
    "(t5x_configs/experiments/preference/cpu).",
    "- *evaluations*: every 20 updates, of 256 held-out pairs and of an output to each of their prompts, with temperature 0.5 "
    "and top-p 0.75; held-out prompts are of the topics that were trained on, in other words. *Better* and *worse LLH*: mean log-likelihood per token of the held-out completions that were "
    "preferred and that were not. *P_win*: mean of σ(quality - quality of the output before the first update). *EAD*: "
    "distinct n-grams of all outputs together, n = 1 to 5, adjusted for their number. *Entropy* and *mass*: of the ten likeliest "
    "tokens in outputs, renormalised for the entropy. *Facts*: share of them that the likeliest continuation still says. *Outside A*: share of "
    "symbols of outputs that are not of language A. docs/preference_indicators.md has the definitions.",
    "- *choices that the paper leaves open*, made when runs of the first seed were there and not yet judged: runs of a seed share their "
    "evaluation before the first update, which counts once; fits and bins are of evaluations with a better LLH above "
    f"{fits.CLIP:g}, below which texts have broken down, and the {fits.BINS} bins have as many evaluations each; the end of "
    f"a run is the mean of its last {results.WINDOW} evaluations, and its best P_win that of the moving mean of as many, at "
    "the middle one; the largest gap is that at the end; β is small below 1; the mass is that of the arm of each method "
    "that moves furthest; for C2 one evaluation on the better side of both likelihoods is enough; C5 reads single evaluations, so "
    "that a rise may be noise. That bins are read with the tail too was added when some runs of the first seed had been seen.",
    f"- *stopping rule*: trainers/preference/indicators/alarm.py as it is by default. A run is over-optimised if P_win at its end is "
    f"more than {rule.LOSS} below its best. An alarm is false where it is not; early where it comes more than an "
    "evaluation before the best P_win; missed where an over-optimised run has none; and in time otherwise, however late.",
    "- *where it falls short*: the paper's models are of 7 and 35 billion parameters, its preferences people's or a large "
    "model's, and its judge a reward model; here quality is exact, and a text is a dozen symbols.",
]


def write(found: Mapping[str, Any], out: pathlib.Path, facts: Mapping[str, Any]) -> Sequence[Claim]:
    """Writes preference.md, preference/results.json and the plots into `out`.

    Args:
      found: by `experiment.run`, as far as it is there.
      out: the folder, such as docs/reproductions.
      facts: command, versions and whatever else the numbers depend on.

    Returns:
      The claims.
    """
    folder = out / "preference"
    drawn = figures.draw(found, folder)
    judged, every = claims.claims(found), results.courses(found)
    record = {**facts, "claims": claim.record(judged), "fits": tables.reductions(every)}
    (folder / "results.json").write_text(_json(record, [_kept(one) for one in every]))
    lines = _page(found, every, judged, drawn, facts)
    (out / "preference.md").write_text("\n".join(lines) + "\n")
    return judged


def _kept(one: Course) -> dict[str, Any]:
    """What the page is made of, for whoever wants to count again."""
    columns = {
        name: [round(value, _DIGITS) if np.isfinite(value) else None for value in values.tolist()]
        for name, values in one.values.items()
    }
    return {"arm": one.arm.name, "seed": one.seed, **columns}


def _json(record: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> str:
    """One object, with a line for each run."""
    lines = ",\n".join(f"  {json.dumps(run)}" for run in runs)
    head = json.dumps(record, indent=1).removesuffix("\n}")
    return f'{head},\n "runs": [\n{lines}\n ]\n}}\n'


def _page(
    found: Mapping[str, Any],
    every: Sequence[Course],
    judged: Sequence[Claim],
    drawn: Mapping[str, str],
    facts: Mapping[str, Any],
) -> list[str]:
    lines = [_HEAD.format(command=facts["command"]), *claim.table(judged), ""]
    lines += ["## How it was measured", "", *_SETUP, *_amount(found, every), ""]
    for name, caption in drawn.items():
        lines += [f"![{caption}](preference/{name})", "", f"*{caption}.*", ""]
    lines += ["## Measurements", "", *claim.measurements(judged)]
    if every:
        lines += ["## All arms", "", *tables.arms(every), ""]
        lines += ["## A line and a parabola", "", *tables.fitted(every), ""]
        lines += ["## The stopping rule", "", *_RULE, "", *rule_claims.tables(every), ""]
    lines.append("Versions: " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()) + ".")
    return lines


_RULE = [
    "P_win in these tables is a mean of three evaluations, and its differences are means over runs. *Before the alarm*: of "
    "the checkpoint of the evaluation before it, which is released without a reward (the last one of a run without an "
    "alarm); *best reward*: of the checkpoint with the best mean reward of the whole run, which is kept with one, whatever the rule says. "
    "Other thresholds are for information: the default is not chosen by them. Online methods are in the first two tables alone."
]


def _amount(found: Mapping[str, Any], every: Sequence[Course]) -> list[str]:
    """How many runs there are, and which are not."""
    rows = found.get("language", ())
    if not rows:
        return ["- Missing, and left out above and below: all of the part `language`."]
    minutes = sum(row["seconds"] for row in rows) / 60
    seeds = sorted({row["seed"] for row in rows})
    out = [
        f"- {len(rows)} runs, of which {len(every)} are evaluated; seeds {', '.join(map(str, seeds))}; {minutes:.0f} "
        "minutes of runs."
    ]
    there = {(one.arm.name, one.seed) for one in every}
    missing = []
    for arm in ARMS:
        left = [seed for seed in seeds if (arm, seed) not in there]
        if left:
            some = f" (seed {', '.join(map(str, left))})" if len(left) < len(seeds) else ""
            missing.append(f"`{arm}`{some}")
    if missing:
        out.append(f"- Missing, and left out above and below: {', '.join(missing)}.")
    return out
