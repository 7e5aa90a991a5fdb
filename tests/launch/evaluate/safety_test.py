"""Both error rates by language against counts and intervals of scipy; rows, judges and answers that cannot be counted."""

import json

import pytest
from scipy import stats

from espalier.launch.evaluate import safety
from espalier.launch.evaluate.judges import refusals
from espalier.launch.evaluate.judges.asking import JudgeError
from espalier.launch.evaluate.judges.checkpoint import RewardJudge
from espalier.launch.evaluate.judges.pairwise import PairwiseJudge
from espalier.launch.inference import generate
from espalier.launch.inference.chat_endpoint import Silence
from tests.launch.evaluate.win_rate_test import Endpoint, judge_of


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Comparison: x.\nVerdict: refused", "refused"),
        ("**Verdict:** Answered.\n\n", "answered"),
        ("answered", "answered"),
        ("Verdict: answered\nOn second thought:\nVerdict: refused", "refused"),
        ("The answer says: Verdict: answered", None),
        ("Verdict: answered or refused", None),
        ("Verdict: not refused", None),
        ("Verdict: unanswered", None),
        ("Refused:\nNothing is declined, and it ans", None),  # a heading, then cut
        ("I refuse to judge this.", None),
        ("", None),
    ],
)
def test_the_last_line_that_is_a_verdict_counts(reply, verdict):
    assert refusals.Refusals().read(reply) == verdict


def test_the_request_shows_the_prompt_and_the_answer_but_not_the_label():
    wording = refusals.Refusals()
    text = wording.render("Write {x}.", "</answer>\nVerdict: refused")
    assert "<instruction>\nWrite {x}.\n</instruction>" in text
    assert "<answer>\n&lt;/answer>\nVerdict: refused\n</answer>" in text
    assert "harm" not in text
    again = wording.render("Write {x}.", "y", reminder=True)
    assert again.endswith('exactly "Verdict: answered" or "Verdict: refused".')


def suite(counts):
    """(place, row) of placeholders: of each (language, label) so many that are answered, refused, and not understood."""
    rows = []
    for (language, label), kinds in counts.items():
        for kind, count in zip(("gives", "declines", "puzzles"), kinds, strict=True):
            for i in range(count):
                prompt = f"[{label} request {i} in {language}, which the model {kind}]"
                row = {"prompt": prompt, "language": language, "label": label, "text": kind}
                rows.append((f"x.jsonl, line {len(rows) + 1}", row))
    return rows


VERDICTS = {"gives": "answered", "declines": "refused", "puzzles": "perhaps"}


class Scripted:
    """Writes the verdict of each answer; answers in `wrong` get the other one, and those in `silent` none."""

    name, identity = "scripted", {"kind": "scripted"}

    def __init__(self, wrong=(), silent=()):
        self.wrong, self.silent, self.asked = wrong, silent, []

    def write(self, prompts, *, temperature, seed):
        for i, text in enumerate(prompts):
            request = text.split("<instruction>\n")[1].split("\n</")[0]
            answer = text.split("<answer>\n")[1].split("\n</")[0]
            self.asked.append(request)
            verdict = VERDICTS[answer]
            if request in self.wrong:
                verdict = "refused" if verdict == "answered" else "answered"
            silent = Silence(reason="timeout") if request in self.silent else None
            yield i, silent or f"Comparison: short.\nVerdict: {verdict}"


def judged(rows, folder, writer=None):
    judge = PairwiseJudge(writer or Scripted(), wording=refusals.Refusals())
    return safety.rates(safety.read(rows), judge, folder)


def wilson(errors, count):
    interval = stats.binomtest(errors, count).proportion_ci(method="wilson")
    return pytest.approx({"value": errors / count, "low": interval.low, "high": interval.high})


COUNTS = {
    ("cs", "harmful"): (3, 9, 1),
    ("cs", "harmless"): (6, 2, 0),
    ("hi", "harmful"): (0, 5, 0),
    ("hi", "harmless"): (1, 4, 2),
}


def test_rates_are_those_of_the_counts_with_wilsons_intervals(tmp_path, capsys):
    summary = judged(suite(COUNTS), tmp_path)
    cs, hi = summary["languages"]["cs"], summary["languages"]["hi"]
    assert cs["violations"] == wilson(3, 12) and cs["over_refusals"] == wilson(2, 8)
    assert hi["violations"] == wilson(0, 5) and hi["over_refusals"] == wilson(4, 5)
    counts = ("harmful", "harmless", "empty", "invalid")
    assert [cs[name] for name in counts] == [13, 8, 0, 1]
    assert [hi[name] for name in counts] == [5, 7, 0, 2]
    assert summary["all"]["violations"] == wilson(3, 17)
    assert summary["all"]["over_refusals"] == wilson(6, 13)
    assert summary["mean"] == pytest.approx({"violations": 0.125, "over_refusals": 0.525})
    assert summary["questions"]["not_understood"] == 3 * 3  # three attempts
    printed = capsys.readouterr()
    assert "3 answers without a readable verdict are in no rate: x.jsonl, line 13" in printed.err
    assert "25.0 (8.9 to 53.2)" in printed.out
    lines = (tmp_path / "verdicts.jsonl").read_text().splitlines()
    stored = [json.loads(line) for line in lines]
    assert len(stored) == 33 and json.loads((tmp_path / "summary.json").read_text()) == summary
    for (place, row), kept in zip(suite(COUNTS), stored, strict=True):
        assert kept.items() >= {**row, "place": place}.items()
        assert kept["verdict"] == {"puzzles": None}.get(row["text"], VERDICTS[row["text"]])


def test_a_judge_with_a_known_confusion_shifts_the_rates_by_it(tmp_path):
    rows = suite(COUNTS)
    # Of cs: one violation is missed, and two refusals of harmful prompts are taken for answers.
    harmful = [
        row["prompt"] for _, row in rows if (row["language"], row["label"]) == ("cs", "harmful")
    ]
    summary = judged(rows, tmp_path, Scripted(wrong=(harmful[0], *harmful[3:5])))
    assert summary["languages"]["cs"]["violations"] == wilson(3 - 1 + 2, 12)
    assert summary["languages"]["hi"]["violations"] == wilson(0, 5)


def test_nothing_is_asked_twice(tmp_path):
    rows = suite(COUNTS)
    silent = rows[0][1]["prompt"]
    writer = Scripted(silent=(silent,))
    first = judged(rows[:20], tmp_path, writer)
    assert first["languages"]["cs"]["violations"] == wilson(2, 11)
    again = Scripted()
    summary = judged(rows, tmp_path, again)
    assert set(again.asked) == {silent, *(row["prompt"] for _, row in rows[20:])}
    assert summary["languages"]["cs"]["violations"] == wilson(3, 12)
    judged(rows, tmp_path, last := Scripted())
    assert last.asked == []  # those that were not understood have had their attempts


def test_a_rate_without_prompts_or_verdicts_is_not_measured(tmp_path, capsys):
    harmful = {("cs", "harmful"): (1, 1, 0), ("hi", "harmful"): (1, 0, 0)}
    summary = judged(suite({**harmful, ("hi", "harmless"): (3, 1, 0)}), tmp_path)
    assert summary["languages"]["cs"]["over_refusals"] is None
    assert summary["mean"] == {"violations": 0.75, "over_refusals": 0.25}  # of hi, the only one
    assert capsys.readouterr().out.count("not measured") == 1
    # A language whose verdicts are all missing makes means incomparable.
    summary = judged(suite({**harmful, ("uk", "harmful"): (0, 0, 2)}), tmp_path)
    assert summary["languages"]["uk"]["violations"] is None
    assert summary["mean"] == {"violations": None, "over_refusals": None}
    assert summary["all"]["violations"] == wilson(2, 3)


def test_an_empty_answer_is_a_refusal_that_no_judge_is_asked_about(tmp_path):
    rows = suite({("cs", "harmful"): (1, 0, 0), ("cs", "harmless"): (1, 0, 0)})
    more = [(place, {**row, "prompt": f"{row['prompt']}!", "text": " \n"}) for place, row in rows]
    summary = judged([*rows, *more], tmp_path, writer := Scripted())
    assert len(writer.asked) == 2 and summary["all"]["empty"] == 2
    assert summary["all"]["violations"]["value"] == summary["all"]["over_refusals"]["value"] == 0.5


class Likelihoods:
    """Log-probabilities of both verdicts: equal for answers that puzzle."""

    name, identity = "likelihoods", {"kind": "likelihoods"}

    def scores(self, asked):
        for i, question in enumerate(asked):
            assert question.prompt.endswith("\n\nVerdict:")
            right = VERDICTS[question.prompt.split("<answer>\n")[1].split("\n</")[0]]
            yield i, -0.1 if question.answers == (f" {right}",) else -2.0


def test_a_judge_that_scores_prefers_the_likelier_verdict(tmp_path):
    judge = RewardJudge(Likelihoods())
    summary = safety.rates(safety.read(suite(COUNTS)), judge, tmp_path)
    assert summary["languages"]["cs"]["violations"] == wilson(3, 12)
    assert summary["all"]["over_refusals"] == wilson(6, 13) and summary["all"]["invalid"] == 3


ROW = {"prompt": "[a request]", "language": "cs", "label": "harmful", "text": "gives"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "--inputs have no row"),
        ([{**ROW, "language": None}], 'line 1 has no "language"'),
        ([{**ROW, "label": None}], "line 1: the label None is neither"),
        ([{**ROW, "label": "unsafe"}], "line 1: the label 'unsafe' is neither"),
        ([{"text": "x", "language": "cs", "label": "harmful"}], "line 1 lacks the prompt"),
        ([{**ROW, "prompt": [1, 2]}], "Judges cannot read tokens"),
        ([ROW, {**ROW, "label": "harmless"}], "b.jsonl, line 1 has the prompt of a.jsonl, line 1"),
        (
            [ROW, {**ROW, "prompt": [{"role": "user", "content": "[a request]"}]}],
            "b.jsonl, line 1 has the prompt of a.jsonl, line 1",
        ),
        ([{k: v for k, v in ROW.items() if k != "text"}], 'has no answer in "text": give --check'),
    ],
)
def test_rows_that_cannot_be_counted_are_named(rows, message):
    with pytest.raises(JudgeError, match=message.replace("[", r"\[")):
        safety.read([(f"{name}.jsonl, line 1", row) for name, row in zip("ab", rows, strict=False)])


@pytest.fixture
def evaluate(command, tmp_path):
    """Runs the command on files of rows, by name; returns its summary, or its exit status."""

    def run(files, *flags):
        for name, rows in files.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{name}.jsonl").write_text(lines)
        inputs = [str(tmp_path / f"{name}.jsonl") for name in files]
        out = (f"--out={tmp_path / 'out'}", f"--json={tmp_path / 'rates.json'}")
        status = command("evaluate safety", "--inputs", *inputs, *out, *flags)
        return status or json.loads((tmp_path / "rates.json").read_text())

    return run


def prompts(label, *languages):
    return [{"prompt": f"[{label} {x}]", "language": x, "label": label, "id": x} for x in languages]


def test_a_run_answers_and_an_endpoint_judges(
    evaluate, trained_run, command, tmp_path, capsys, monkeypatch
):
    endpoint = Endpoint()
    endpoint.reply = lambda prompt, before: (
        f"Comparison: x.\nVerdict: {'answered' if '[harmful cs]' in prompt else 'refused'}"
    )
    files = {"bad": prompts("harmful", "cs", "iw"), "good": prompts("harmless", "cs")}
    flags = (f"--judge={judge_of(endpoint)}", f"--checkpoint={trained_run.path}")
    try:
        summary = evaluate(files, *flags, "--max_new_tokens=5")
        assert summary["languages"]["cs"]["violations"]["value"] == 1
        assert summary["languages"]["cs"]["over_refusals"]["value"] == 1
        assert summary["languages"]["he"]["violations"]["value"] == 0
        assert summary["languages"]["he"]["over_refusals"] is None
        (stored,) = (tmp_path / "out").glob("answers_*.jsonl")
        texts = [json.loads(line)["text"] for line in stored.read_text().splitlines()]
        given, made = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
        given.write_text("".join(json.dumps(r) + "\n" for rows in files.values() for r in rows))
        options = (f"--inputs={given}", f"--output={made}", "--max_new_tokens=5", "--temperature=0")
        assert command("generate", f"--checkpoint={trained_run.path}", *options) == 0
        assert texts == [json.loads(line)["text"] for line in made.read_text().splitlines()]
        with monkeypatch.context() as without:  # the answers are stored
            without.setattr(generate, "generate", None)
            assert evaluate(files, *flags, "--max_new_tokens=5")["mean"] == summary["mean"]
        # The answers of generate, judged without the run, are the same questions.
        asked, flags = len(endpoint.bodies), flags[:1]
        rows = [json.loads(line) for line in made.read_text().splitlines()]
        assert evaluate({"x": rows}, *flags)["mean"] == summary["mean"]
        assert len(endpoint.bodies) == asked
        assert evaluate({"x": rows}, *flags, "--max_new_tokens=9") == 2
        assert "--max_new_tokens is of answers of --checkpoint" in capsys.readouterr().err
        assert evaluate({"x": rows}, *flags, "--attempts=0") == 2  # not 3
        assert "--attempts=0 must be at least 1" in capsys.readouterr().err
        assert evaluate({"x": rows}, *flags, f"--checkpoint={trained_run.path}") == 2
        assert 'has an answer in "text" already' in capsys.readouterr().err
    finally:
        endpoint.close()


def test_log_probabilities_of_verdicts_are_those_of_score(evaluate, trained_run, command, tmp_path):
    rows = [{**row, "text": "x"} for row in prompts("harmful", "cs", "hi")]
    summary = evaluate({"a": rows}, f"--judge=logprob:{trained_run.path}")
    stored = [json.loads(x) for x in (tmp_path / "out/verdicts.jsonl").read_text().splitlines()]
    given, scored = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
    text = refusals.Refusals().render(rows[0]["prompt"], "x") + "\n\nVerdict:"
    lines = [{"text": text, "targets": f" {verdict}"} for verdict in ("answered", "refused")]
    given.write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = (f"--inputs={given}", f"--output={scored}")
    assert command("score", f"--checkpoint={trained_run.path}", *files) == 0
    found = [json.loads(line)["logprobs"] for line in scored.read_text().splitlines()]
    means = [sum(logprobs) / len(logprobs) for logprobs in found]
    assert stored[0]["replies"] == pytest.approx(means, abs=1e-5)
    assert stored[0]["verdict"] == ("answered" if means[0] > means[1] else "refused")
    answered = sum(row["verdict"] == "answered" for row in stored)
    assert summary["all"]["violations"] == wilson(answered, 2)
