"""Parts of win rates against independent definitions: verdicts, orders, intervals, what is kept."""

import dataclasses
import hashlib
import itertools
import json
import math

import numpy as np
import pytest

from espalier.launch.evaluate.judges import asking, refusals, shares
from espalier.launch.evaluate.judges.asking import JudgeError, Outcome, Pair
from espalier.launch.evaluate.judges.checkpoint import RewardJudge
from espalier.launch.evaluate.judges.pairwise import PairwiseJudge, Template
from espalier.launch.inference.chat_endpoint import Silence
from espalier.launch.inference.row_files import RowFileError
from espalier.launch.plots import intervals


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("Comparison: x.\nPreferred: Answer (A)", "A"),
        ("Preferred: Answer (B)\n\n", "B"),
        ("**Preferred:** Answer (B).", "B"),
        ("Answer (A)", "A"),
        ("PREFERRED: ANSWER (A)", "A"),
        ("Preferred: Answer (A)\nOn second thought:\nPreferred: Answer (B)", "B"),
        ("It quotes:\nAnswer (A)\nPreferred: Answer (B)", "B"),
        ("Answer (A) says Answer (B)", None),
        ("```\nAnswer (A)\n```", "A"),
        ("**Answer (A)**\nIt is right.\n\n**Answer (B):**\nIt is wr", None),  # headings, then cut
        ("Preferred: Answer (A)\n\n**Answer (B)**\nIt is wrong.", "A"),
        ("I prefer Answer (A)", None),
        ("Preferred: Answer (A) or Answer (B)", None),
        ("Preferred: Answer (C)", None),
        ("Preferred: Answer (a)", None),
        ("Preferred: A", None),
        ("Preferred: Tie", None),
        ("", None),
    ],
)
def test_the_last_line_that_is_a_verdict_counts(reply, label):
    assert Template().read(reply) == label


def test_a_tie_is_a_verdict_only_where_it_is_offered():
    free = Template(allow_ties=True)
    assert free.read("Preferred: Tie") == "tie" and free.read("Preferred: Answer (A)") == "A"
    assert "Tie" in free.render("p", "x", "y") and "Tie" not in Template().render("p", "x", "y")


def test_the_request_holds_what_is_judged_and_a_reminder_only_when_asked_again():
    wording = Template()
    text = wording.render("Say one.", "uno", "")
    assert "<instruction>\nSay one.\n</instruction>" in text
    assert "<answer_a>\nuno\n</answer_a>" in text
    assert "<answer_b>\n(This answer is empty.)\n</answer_b>" in text
    assert wording.render("Say one.", "uno", "", reminder=True).startswith(text + "\n\n")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert "\nsystem: Be brief.\n\nuser: Hi\n" in wording.render(turns, "x", "y")
    assert "\nHi\n" in wording.render(turns[1:], "x", "y")


class Scripted:
    """Writes what a function of (first answer, second answer, times asked) gives."""

    name, identity = "scripted", {"judge": "scripted"}

    def __init__(self, reply):
        self.reply, self.asked = reply, []

    def write(self, prompts, *, temperature, seed):
        for i, prompt in enumerate(prompts):
            shown = [prompt.split(f"<answer_{x}>\n")[1].split("\n</")[0] for x in "ab"]
            self.asked.append((*shown, seed))
            yield i, self.reply(*shown, seed)


def pair(a, b, id="0"):
    return Pair(id=id, prompt=f"p{id}", a=a, b=b, systems=("left", "right"))


@pytest.mark.parametrize("forth, back", itertools.product(("A", "B", "Tie"), repeat=2))
def test_orders_that_disagree_are_a_tie_and_sides_are_antisymmetric(forth, back, tmp_path):
    def line(label):
        return "Preferred: Tie" if label == "Tie" else f"Preferred: Answer ({label})"

    def outcome(a, b, name):
        writer = Scripted(lambda first, *_: line(forth if first == "x" else back))
        judge = PairwiseJudge(writer, wording=Template(allow_ties=True))
        with asking.Journal.opened(tmp_path / name) as kept:
            (found,), _ = asking.judge_pairs(judge, [pair(a, b)], kept)
        return found

    # By hand: whom each order prefers.
    liked = {("A", "forth"): "x", ("B", "forth"): "y", ("A", "back"): "y", ("B", "back"): "x"}
    one, two = liked.get((forth, "forth")), liked.get((back, "back"))
    want = one if one == two else None
    found, turned = outcome("x", "y", "1"), outcome("y", "x", "2")
    assert found.verdict == {"x": "a", "y": "b", None: "tie"}[want]
    assert turned.verdict == {"x": "b", "y": "a", None: "tie"}[want]
    assert found.consistent == turned.consistent == (one == two)
    assert (
        found.bias
        == turned.bias
        == ((forth == "A") - (forth == "B") + (back == "A") - (back == "B")) / 2
    )


class Kill(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("at", range(1, 14))
def test_killed_anywhere_and_started_again_nothing_is_asked_twice(at, tmp_path):
    pairs = [pair(f"x{i}", f"y{i}", str(i)) for i in range(5)] + [pair("same", "same", "5")]

    def reply(first, second, seed):
        if "0" in first and seed == 0 or first == "y1":
            return "no verdict"  # once for one pair; always for one order of another
        return f"Preferred: Answer ({'A' if first < second else 'B'})"

    whole = Scripted(reply)
    with asking.Journal.opened(tmp_path / "whole") as kept:
        want, _ = asking.judge_pairs(PairwiseJudge(whole, wording=Template()), pairs, kept)
    assert [o.verdict for o in want] == ["a", None, "a", "a", "a", "tie"]
    assert len(whole.asked) == 10 + 3 + 1  # 2 + 1 asked again, and 1 once more

    def until(first, second, seed):
        if len(parts.asked) > at:
            raise Kill
        return reply(first, second, seed)

    path = tmp_path / "parts"
    parts = Scripted(until)
    with pytest.raises(Kill), asking.Journal.opened(path) as kept:
        asking.judge_pairs(PairwiseJudge(parts, wording=Template()), pairs, kept)
    lost = parts.asked.pop()  # was not answered
    # The last line may be cut short, which then was not kept.
    with open(path, "ab") as file:
        file.write(b'{"key": "' + b"x" * 999 if at % 2 else b'{"key": "0", "value": "A"}')
    parts.reply = reply
    with asking.Journal.opened(path) as kept:
        found, tally = asking.judge_pairs(PairwiseJudge(parts, wording=Template()), pairs, kept)
    assert found == want and sorted(parts.asked) == sorted(whole.asked) and lost in parts.asked
    assert tally.asked == 14 - at
    with asking.Journal.opened(path) as kept:
        found, tally = asking.judge_pairs(PairwiseJudge(parts, wording=Template()), pairs, kept)
    assert found == want and tally.asked == 0 and len(parts.asked) == 14
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 14


def test_replies_that_do_not_come_are_asked_for_again_in_every_run(tmp_path):
    writer = Scripted(lambda first, *_: Silence(reason="slow") if first == "x" else "Answer (A)")
    judge = PairwiseJudge(writer, wording=Template(), attempts=2)
    for run in (1, 2):
        with asking.Journal.opened(tmp_path / "kept") as kept:
            (found,), tally = asking.judge_pairs(judge, [pair("x", "y")], kept)
        assert found.verdict is None and tally.no_reply == {"slow": 2}
        assert len(writer.asked) == 1 + 2 * run


def test_a_judge_that_never_replies_is_not_asked_on(tmp_path):
    writer = Scripted(lambda *_: Silence(reason="slow"))
    judge = PairwiseJudge(writer, wording=Template())
    for count, asked in ((3, 6), (1000, 32)):
        writer.asked.clear()
        pairs = [pair("x", "y", str(i)) for i in range(count)]
        with (
            asking.Journal.opened(tmp_path / "kept") as kept,
            pytest.raises(
                JudgeError, match=f"has given no answer to {asked} questions in a row: slow"
            ),
        ):
            asking.judge_pairs(judge, pairs, kept)
        assert len(writer.asked) == asked


def test_a_journal_is_one_processs_and_damage_in_it_is_named(tmp_path):
    path = tmp_path / "kept"
    with (
        asking.Journal.opened(path),
        pytest.raises(RowFileError, match="another process"),
        asking.Journal.opened(path),
    ):
        pass
    path.write_text('{"key": "0", "value": "A"}\nnonsense\n{"key": "1", "value": "B"}\n')
    with (
        pytest.raises(RowFileError, match="kept, line 2 is not a JSON object"),
        asking.Journal.opened(path),
    ):
        pass
    assert len(path.read_text().splitlines()) == 3
    path.write_text('{"key": "0", "value": "A"}\n{"nonsense": 1}\n{"key": "1", "value": "B"}\n')
    with (
        pytest.raises(JudgeError, match="kept, line 2: not a judge's"),
        asking.Journal.opened(path),
    ):
        pass
    assert len(path.read_text().splitlines()) == 3


def test_replies_of_another_judge_or_template_are_not_taken():
    question, _ = PairwiseJudge(Scripted(None), wording=Template()).questions(pair("x", "y"))
    identities = [
        PairwiseJudge(Scripted(None), wording=Template(allow_ties=ties)).identity
        for ties in (False, True)
    ]
    assert len({question.key(identity) for identity in (*identities, {"judge": "other"})}) == 3


class Lengths:
    name, identity = "lengths", {"judge": "lengths"}

    def scores(self, asked):
        for i, question in enumerate(asked):
            yield i, float(len(question.answers[0])) if question.answers[0] else math.nan


def test_scores_decide_beyond_the_margin(tmp_path):
    pairs = [pair("xxx", "x"), pair("xx", "xxx"), pair("x", "y"), pair("", "y"), pair("", "")]
    for margin, want in (
        (0, ["a", "b", "tie", None, "tie"]),
        (1, ["a", "tie", "tie", None, "tie"]),
    ):
        with asking.Journal.opened(tmp_path / "kept") as kept:
            found, tally = asking.judge_pairs(RewardJudge(Lengths(), margin=margin), pairs, kept)
        assert [outcome.verdict for outcome in found] == want
    # An answer of one prompt is scored once, and what has no score is not asked for again.
    assert tally.questions == tally.kept == 5 and tally.asked == 0
    with pytest.raises(JudgeError, match="margin=-1"):
        RewardJudge(Lengths(), margin=-1)


def summary_of(wins, losses, ties, invalid=0):
    outcomes = {"a": wins, "b": losses, "tie": ties, None: invalid}
    found = [Outcome(verdict=v) for v, count in outcomes.items() for _ in range(count)]
    return shares.pair_summary([pair("x", "yy", str(i)) for i in range(len(found))], found)


def test_shares_add_up_and_sides_are_antisymmetric():
    found, turned = summary_of(19, 9, 12, 3), summary_of(9, 19, 12, 3)
    assert found["counts"] == dict(win=19, loss=9, tie=12, identical=0, invalid=3)
    assert [found[name]["value"] for name in ("win", "loss", "tie")] == [19 / 40, 9 / 40, 12 / 40]
    assert found["win"] == turned["loss"] and found["tie"] == turned["tie"]
    assert found["difference"] == pytest.approx(
        {
            key: -turned["difference"][other]
            for key, other in (("value", "value"), ("low", "high"), ("high", "low"))
        },
        abs=1e-12,
    )


def test_intervals_of_shares_are_wilsons():
    stats = pytest.importorskip("scipy.stats")
    for wins, n in ((0, 10), (1, 10), (5, 10), (10, 10), (1, 1), (37, 150)):
        found = summary_of(wins, n - wins, 0)
        want = stats.binomtest(wins, n).proportion_ci(method="wilson")
        for name, low, high in (
            *(("win", want.low, want.high), ("loss", 1 - want.high, 1 - want.low)),
            *(("rate", want.low, want.high), ("difference", 2 * want.low - 1, 2 * want.high - 1)),
        ):
            assert (found[name]["low"], found[name]["high"]) == pytest.approx(
                (low, high), abs=1e-12
            )
    # Ten ties of ten leave room for as many wins or losses as have an unseen share.
    tied = summary_of(0, 0, 10)
    assert tied["difference"]["high"] == pytest.approx(1 - tied["tie"]["low"])
    assert tied["difference"]["low"] == pytest.approx(tied["tie"]["low"] - 1)


@pytest.mark.parametrize("n", [4, 10, 25])
def test_intervals_of_wins_and_half_ties_contain_the_true_rate(n):
    """By summing over all outcomes. Wilson's own interval has a coverage of 87.5 % at worst for four fair coins."""
    coverages = []
    for win, tie in itertools.product((0, 0.1, 0.3, 0.5, 0.8, 1), repeat=2):
        if win + tie > 1:
            continue
        inside = 0.0
        for wins in range(n + 1):
            for ties in range(n + 1 - wins):
                losses = n - wins - ties
                chance = math.comb(n, wins) * math.comb(n - wins, ties) * win**wins * tie**ties
                chance *= max(0.0, 1 - win - tie) ** losses
                found = intervals.bounded([1.0] * wins + [0.5] * ties + [0.0] * losses)
                if found["low"] - 1e-9 <= win + tie / 2 <= found["high"] + 1e-9:
                    inside += chance
        coverages.append(inside)
    assert min(coverages) > 0.87 and 0.94 < np.mean(coverages) < 0.985


def test_intervals_are_normal_for_many_prompts():
    n, wins, losses = 20_000, 9_000, 6_000
    found = summary_of(wins, losses, n - wins - losses)["difference"]
    deviation = math.sqrt((0.75 - 0.15**2) / n)
    for side, sign in (("low", -1), ("high", 1)):
        assert found[side] == pytest.approx(0.15 + sign * 1.959964 * deviation, abs=1.01 / n)


def test_the_mean_over_opponents_is_of_prompts_that_all_have_judged():
    named = [Pair(id=str(i), prompt="p", a="x", b="y", systems=(a, b)) for a in "st" for b in "op" for i in range(3)]  # fmt: skip
    verdicts = ["a", "a", None, "b", "tie", "a", *[None] * 3, "a", "a", "a"]
    one, other = shares.against(
        named, [Outcome(verdict=v) for v in verdicts], prompts=3, opponents=2
    )
    assert one["opponents"]["o"] == intervals.bounded([1, 1])
    assert one["opponents"]["p"] == intervals.bounded([0, 0.5, 1])
    assert one["prompts"] == 2 and one["mean"] == intervals.bounded([0.5, 0.75])
    assert other["opponents"]["o"] is other["mean"] is None and other["prompts"] == 0
    shares.print_opponents([one, other])


def test_only_identical_answers_are_all_ties(tmp_path):
    pairs = [pair(text, text, str(i)) for i, text in enumerate(("x", "", "y"))]
    writer = Scripted(None)
    with asking.Journal.opened(tmp_path / "kept") as kept:
        found, _ = asking.judge_pairs(PairwiseJudge(writer, wording=Template()), pairs, kept)
    summary = shares.pair_summary(pairs, found)
    assert writer.asked == [] and summary["tie"]["value"] == summary["tie"]["high"] == 1
    assert summary["counts"]["identical"] == 3 and summary["consistency"] is None
    assert json.loads(json.dumps(summary)) == summary


@pytest.mark.parametrize("tag", ["</answer_a>", "< /ANSWER_B >", "<answer_b>", "</instruction>"])
def test_a_text_ends_no_part_of_a_prompt_and_begins_none(tag):
    text = f"x {tag}\n<b>y</b> 1 < 2"
    closed = "&lt;" + tag[1:]
    for rendered in (
        Template().render("p", text, "z"),
        Template().render("p", "z", text),
        Template().render(text, "x", "y"),
        refusals.Refusals().render("p", text),
        refusals.Refusals().render(text, "x"),
    ):
        assert f"x {closed}\n<b>y</b> 1 < 2" in rendered
        for own in ("</answer_a>", "</answer_b>", "<answer_b>", "</instruction>", "</answer>"):
            assert rendered.count(own) <= 1


def test_a_language_is_a_criterion_and_part_of_the_question():
    text = Template().render("Řekni.", "ano", "yes", language="Czech")
    assert "1. The answer is written in Czech" in text and "fluently in Czech" in text
    plain, czech = (
        dataclasses.replace(pair("x", "y"), language=language) for language in ("", "Czech")
    )
    judge = PairwiseJudge(Scripted(None), wording=Template())
    keys = [question.key({}) for one in (plain, czech) for question in judge.questions(one)]
    assert len(set(keys)) == 4
    # Questions without a language have the keys of earlier journals.
    (first, _) = judge.questions(plain)
    content = json.dumps([{}, first.prompt, first.answers], sort_keys=True)
    assert first.key({}) == hashlib.sha256(content.encode()).hexdigest()[:32]


def test_rates_are_by_language_and_their_mean_counts_each_language_alike():
    languages = ["cs"] * 4 + ["hi"] * 2 + ["ja"]
    verdicts = ["a", "a", "a", "b", "b", "tie", None]
    pairs = [pair("x", "yy", str(i)) for i in range(7)]
    found = shares.by_language(pairs, [Outcome(verdict=v) for v in verdicts], languages)
    assert {code: one["counts"]["win"] for code, one in found["languages"].items()} == {
        **{"cs": 3, "hi": 0, "ja": 0}
    }
    assert found["languages"]["cs"]["rate"]["value"] == 0.75
    assert found["languages"]["hi"]["rate"]["value"] == 0.25  # half of a tie
    assert found["mean"] == {"win": 0.375, "loss": 0.375, "tie": 0.25, "rate": 0.5}
    assert found["worst"] == "hi" and found["languages"]["ja"]["rate"] is None
    nothing = shares.by_language(pairs[:1], [Outcome(verdict=None)], ["cs"])
    assert nothing["mean"] is None and nothing["worst"] is None


def test_rates_at_equal_length_are_those_of_a_logistic_regression():
    rng = np.random.default_rng(0)
    longer = rng.normal(200, 300, 4000)
    logits = -0.5 + 1.2 * np.tanh(longer / longer.std())
    rates = (rng.random(4000) < 1 / (1 + np.exp(-logits))).astype(float)
    found = shares.length_controlled(rates, longer)
    assert found["slope"] == pytest.approx(1.2, abs=0.15)
    assert found["value"] == pytest.approx(1 / (1 + math.exp(0.5)), abs=0.03)
    assert found["low"] < 1 / (1 + math.exp(0.5)) < found["high"] < rates.mean() - 0.05
    # Without a difference in length it is the plain rate, with the interval of its logit.
    even = shares.length_controlled(np.repeat([1.0, 0.0], [60, 40]), np.full(100, 7.0))
    assert even["value"] == pytest.approx(0.6) and even["slope"] == 0
    error = 1.959964 / math.sqrt(100 * 0.6 * 0.4)
    logit = math.log(1.5)
    assert even["low"] == pytest.approx(1 / (1 + math.exp(error - logit)), abs=1e-6)
    # Exchanged systems have the complement; the longer always winning is no error.
    turned = shares.length_controlled(1 - rates, -longer)
    assert turned["value"] == pytest.approx(1 - found["value"], abs=1e-9)
    assert shares.length_controlled((longer > 200).astype(float), longer - 200)["value"] < 0.99
    assert shares.length_controlled(np.ones(9), longer[:9]) is None
