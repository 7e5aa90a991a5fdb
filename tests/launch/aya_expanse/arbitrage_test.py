"""Arbitrage end to end: teachers behind an endpoint that fails half way, hangs or answers garbage, and a checkpoint."""

import collections
import contextlib
import http.server
import itertools
import json
import re
import shutil
import sys
import threading
import time
import types

import pytest

from espalier.data.aya_expanse.pool import Teacher
from espalier.data.languages import identify
from espalier.data.languages.table import LANGUAGES
from espalier.launch.aya_expanse import completions
from espalier.launch.aya_expanse.teachers import SamplingFlags, at_work
from espalier.launch.inference.generate import generate
from espalier.launch.load import load_run
from espalier.trainers.decoding.sampling import Sampling
from espalier.trainers.decoding.settings import Settings

KEY = "the-key-itself"  # pragma: allowlist secret


class Endpoint:
    """Teachers by name of the model: functions (prompt, times asked before) -> text, bytes of a reply, or a status."""

    def __init__(self):
        self.teachers, self.asked, self.bodies = {}, collections.Counter(), []
        self.keys, lock, endpoint = set(), threading.Lock(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][-1]["content"]
                with lock:
                    before = endpoint.asked[body["model"], prompt]
                    endpoint.asked[body["model"], prompt] += 1
                    endpoint.bodies.append(body)
                    endpoint.keys.add(self.headers["Authorization"])
                reply = endpoint.teachers[body["model"]](prompt, before)
                status = reply if isinstance(reply, int) else 200
                if isinstance(reply, str):
                    usage = {"prompt_tokens": len(prompt), "completion_tokens": len(reply)}
                    choice = {"message": {"content": reply}, "finish_reason": "stop"}
                    reply = json.dumps({"choices": [choice], "usage": usage}).encode()
                data = reply if isinstance(reply, bytes) else f"{KEY} is bad".encode()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def count(self, model):
        """Number of requests to a model."""
        return sum(n for (name, _), n in self.asked.items() if name == model)

    def close(self):
        self._server.shutdown()
        self._server.server_close()


def right_in(*languages):
    """Answers right in some languages; the prompt is `LANGUAGE NUMBER`, the answer NUMBER + 1."""

    def reply(prompt, before):
        language, number = prompt.split()
        return str(int(number) + 1) if language in languages else f"{number}?"

    return reply


PROMPTS = [
    {"prompt": f"{language} {i}", "language": language, "answer": str(i + 1), "source_id": i}
    for i in range(6)
    for language in ("tr", "uk")
]


@pytest.fixture
def endpoint():
    made = Endpoint()
    made.teachers = {"turk": right_in("tr"), "ukr": right_in("uk"), "none": right_in()}
    yield made
    made.close()


@pytest.fixture
def arbitrage(command, endpoint, tmp_path):
    """Runs the command; returns its status, or the files of --out."""
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))

    def run(
        *flags, teachers=("turk", "ukr"), out="out", fixed="", pool=None, reward="exact_answer"
    ):
        lines = [
            f"  - {{name: {name}, url: '{endpoint.url}', model: {name}, key_file: '{tmp_path / 'key'}', "
            f"timeout: 0.5, retries: 0, concurrency: 2, new_price: 2.0}}\n"
            for name in teachers
        ]
        text = "teachers:\n" + "".join(lines) + (pool or "") + fixed
        (tmp_path / "pool.yaml").write_text(text)
        files = (f"--pool={tmp_path / 'pool.yaml'}", f"--prompts={tmp_path / 'prompts.jsonl'}")
        rewards = () if reward is None else (f"--reward={reward}",)
        status = command("prepare arbitrage", *files, f"--out={tmp_path / out}", *rewards, *flags)
        return status or Files(tmp_path / out)

    return run


class Files:
    def __init__(self, folder):
        self.folder = folder
        self.summary = json.loads((folder / "summary.json").read_text())
        self.sft, self.pairs = self.rows("sft.jsonl"), self.rows("pairs.jsonl")

    def rows(self, name):
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def chosen(self):
        return [row["teacher"] for row in self.sft]

    def bytes(self):
        return {name: (self.folder / name).read_bytes() for name in ("sft.jsonl", "pairs.jsonl")}


def test_each_prompt_gets_its_best_teacher_once(arbitrage, endpoint, capsys):
    made = arbitrage()
    assert made.chosen == ["turk", "ukr"] * 6  # right in its own language alone
    assert [row["messages"][-1]["content"] for row in made.sft] == [
        row["answer"] for row in PROMPTS
    ]
    assert {row["reward"] for row in made.sft} == {1.0}
    assert [row["source_id"] for row in made.sft] == [row["source_id"] for row in PROMPTS]
    assert [(p["chosen_teacher"], p["rejected_teacher"]) for p in made.pairs] == [
        ("turk", "ukr"),
        ("ukr", "turk"),
    ] * 6
    assert all(p["chosen_reward"] > p["rejected_reward"] for p in made.pairs)
    assert set(endpoint.asked.values()) == {1}
    body = endpoint.bodies[0]
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.8, 0.95, 512)
    by = {(row["language"], row["teacher"]): row for row in made.summary["table"]}
    assert by["tr", "turk"]["chosen"] == 1.0 and by["tr", "ukr"]["reward"] == 0.0
    assert by["tr", "turk"]["cost"] == pytest.approx(6 * 2e-6)  # one character each
    assert "| tr | turk | 6 | 100.0% | 1 |" in capsys.readouterr().out
    # The key is sent, and written nowhere.
    assert endpoint.keys == {f"Bearer {KEY}"}
    assert not any(KEY in p.read_text() for p in made.folder.iterdir() if p.is_file())
    # Another routing or another teacher requests only what is missing.
    again = arbitrage()
    assert again.bytes() == made.bytes() and again.summary["teachers"]["turk"]["earlier"] == 12
    assert arbitrage("--routing=single", "--teacher=turk").chosen == ["turk"] * 12
    assert arbitrage("--per=language").chosen == ["turk", "ukr"] * 6
    fixed = "fixed: {tr: ukr, default: turk}\n"
    assert arbitrage("--routing=fixed", fixed=fixed, reward=None).chosen == ["ukr", "turk"] * 6
    drawn = arbitrage("--routing=random", "--seed=0").chosen
    assert set(drawn) == {"turk", "ukr"} and set(endpoint.asked.values()) == {1}
    arbitrage(teachers=("turk", "ukr", "none"))
    assert endpoint.count("none") == 12 and endpoint.count("turk") == 12


def test_one_teacher_by_reward_is_the_single_teacher_and_ties_go_to_the_first(arbitrage, endpoint):
    by_reward = arbitrage(teachers=("turk",))
    single = arbitrage("--routing=single", "--teacher=turk", teachers=("turk",), out="other")
    assert by_reward.sft == single.sft and by_reward.pairs == []
    endpoint.teachers = {"ukr": right_in("tr", "uk"), "turk": right_in("tr", "uk")}
    tied = arbitrage(out="tied")
    assert tied.chosen == ["turk"] * 12 and tied.pairs == []
    assert arbitrage(out="tied", teachers=("ukr", "turk")).chosen == ["ukr"] * 12


def test_routed_rewards_are_no_less_than_those_of_any_teacher(arbitrage, endpoint):
    endpoint.teachers["none"] = lambda prompt, _: prompt.split()[1]
    made = arbitrage(teachers=("none", "turk", "ukr"))
    routed = sum(row["reward"] for row in made.sft)
    rewards = collections.Counter()
    for row in made.rows("rewards.jsonl"):
        rewards[row["teacher"]] += row["reward"]
    assert routed == 12 and max(rewards.values()) == 6


def test_a_stored_reward_is_of_the_same_answer_and_the_same_right_one(arbitrage, tmp_path):
    arbitrage()
    twice = [{**PROMPTS[0], "id": "right"}, {**PROMPTS[0], "id": "corrected", "answer": "0?"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in twice))
    assert arbitrage().chosen == ["turk", "ukr"]
    journal = tmp_path / "out" / "completions.jsonl"  # as if it had been requested again
    journal.write_text(
        journal.read_text()
        .replace('"text":"0?"', '"text":"8"')
        .replace('"text": "0?"', '"text": "8"')
    )
    assert arbitrage().pairs[0]["rejected"][0]["content"] == "8" and len(arbitrage().pairs) == 1


class StopError(BaseException):
    """Stands for a kill."""


def test_a_killed_start_goes_on_without_a_second_request(arbitrage, endpoint, monkeypatch):
    whole = arbitrage(out="whole").bytes()
    endpoint.asked.clear()
    add, count = completions.Store.add, itertools.count(1)

    def stop(store, row):
        number = next(count)  # of both teachers' threads
        add(store, row)
        if number == 9:
            raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(completions.Store, "add", stop)
        with pytest.raises(StopError):
            arbitrage()
    made = arbitrage()
    assert made.bytes() == whole
    # Only what was in flight when it was killed is requested again: two requests to each teacher.
    assert sum(n - 1 for n in endpoint.asked.values()) <= 4
    # A row that was cut short by the kill is requested again, and no other.
    journal = made.folder / "completions.jsonl"
    endpoint.asked.clear()
    journal.write_bytes(journal.read_bytes()[:-20])
    assert arbitrage().bytes() == whole and sum(endpoint.asked.values()) == 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda prompt, before: 500, "HTTP 500"),
        (lambda prompt, before: b"<html>", "not JSON"),
        (lambda prompt, before: b"{}", "no choices"),
        (lambda prompt, before: b'{"choices": [{"message": {"content": "\\ud800"}}]}', "Unicode"),
        (lambda prompt, before: b"[" * 100_000, "not JSON"),
        (lambda prompt, before: time.sleep(1.5) or b"{}", "no whole reply within 0.5 s"),
    ],
    ids=["500", "html", "empty", "unicode", "nested", "hang"],
)
def test_a_teacher_that_fails_half_way_costs_nothing_of_the_others(
    arbitrage, endpoint, capsys, fault, reason
):
    good = right_in("uk")
    endpoint.teachers["ukr"] = lambda p, n: good(p, n) if int(p.split()[1]) < 4 else fault(p, n)
    made = arbitrage("--attempts=1")
    assert len(made.sft) == 12 and made.chosen[:8] == ["turk", "ukr"] * 4
    assert made.chosen[8:] == ["turk"] * 4  # the only answers
    table = {(row["language"], row["teacher"]): row for row in made.summary["table"]}
    assert table["uk", "ukr"]["no answer"] == 2
    said = capsys.readouterr().err
    assert "warning: ukr: " in said and reason in said and KEY not in said
    endpoint.asked.clear()
    endpoint.teachers["ukr"] = good
    assert arbitrage().chosen == ["turk", "ukr"] * 6
    assert sum(endpoint.asked.values()) == 4  # those that had failed


def test_an_attempt_may_help_and_a_rejected_key_ends_one_teacher(arbitrage, endpoint, capsys):
    good = right_in("uk")
    endpoint.teachers["ukr"] = lambda p, n: good(p, n) if n else 500
    assert arbitrage("--attempts=2").chosen == ["turk", "ukr"] * 6
    endpoint.teachers["ukr"] = lambda p, n: 401
    made = arbitrage(out="other")
    assert made.chosen == ["turk"] * 12 and endpoint.count("ukr") < 24 + 12
    assert "rejects the API key" in made.summary["teachers"]["ukr"]["failed"]
    assert "warning: ukr failed" in capsys.readouterr().err
    endpoint.teachers = dict.fromkeys(("turk", "ukr"), lambda p, n: 401)
    assert arbitrage(out="third") == 2
    assert "There is no answer to any prompt" in capsys.readouterr().err


def test_a_silent_teacher_is_not_waited_for_again_and_again(arbitrage, endpoint, monkeypatch):
    from espalier.launch.aya_expanse import teachers

    monkeypatch.setattr(teachers, "_PATIENCE", 3)
    endpoint.teachers["ukr"] = lambda p, n: 503
    made = arbitrage()
    assert "has given no answer to 3 requests in a row" in made.summary["teachers"]["ukr"]["failed"]
    assert endpoint.count("ukr") <= 3 + 1 and made.chosen == ["turk"] * 12


def test_a_teacher_that_refuses_every_prompt_is_named_when_it_does(
    arbitrage, endpoint, capsys, monkeypatch
):
    seen = []
    write = completions.Bar.write
    monkeypatch.setattr(
        completions.Bar,
        "write",
        lambda text, **options: (seen.append(endpoint.count("turk")), write(text, **options)),
    )
    right = right_in("tr")
    endpoint.teachers["turk"] = lambda p, n: time.sleep(0.2) or right(p, n)
    endpoint.teachers["ukr"] = lambda p, n: 400
    made = arbitrage()
    assert endpoint.count("ukr") == 2 and made.chosen == ["turk"] * 12
    assert "refuses every request: HTTP 400" in made.summary["teachers"]["ukr"]["failed"]
    assert capsys.readouterr().err.count("warning: ukr failed") == 1
    assert len(seen) == 1 and seen[0] < 12  # while the other teacher answers


def test_a_key_in_a_reply_is_not_written(arbitrage, endpoint):
    endpoint.teachers["turk"] = lambda p, n: f"1 {KEY}"
    made = arbitrage(teachers=("turk",))
    assert {row["text"] for row in made.rows("completions.jsonl")} == {"1 ***"}
    assert not any(KEY in p.read_text() for p in made.folder.iterdir() if p.is_file())


def test_answers_in_another_language_and_empty_ones_are_not_used(arbitrage, endpoint, monkeypatch):
    own = types.ModuleType("own_language")
    own.language_of = lambda text: {"?": "en", "!": None}.get(text[-1], "tr-TR")
    monkeypatch.setitem(sys.modules, "own_language", own)
    check = "--language_of=own_language:language_of"
    made = arbitrage(check, "--languages=tr")
    assert made.chosen == ["turk"] * 6 and made.pairs == []
    (row,) = [row for row in made.summary["table"] if row["teacher"] == "ukr"]
    assert row["wrong language"] == 6 and row["asked"] == 6
    endpoint.teachers["turk"] = lambda p, n: "5!" if p.endswith("0") else " "
    made = arbitrage(check, "--languages=tr", out="other")
    assert len(made.sft) == 1 and made.summary["teachers"]["turk"]["dropped"] == {"empty": 5}


def test_rows_that_cannot_be_checked_are_refused_before_any_request(
    arbitrage, endpoint, monkeypatch, capsys
):
    own = types.ModuleType("own_language")
    own.language_of = lambda text: "tr"
    monkeypatch.setitem(sys.modules, "own_language", own)
    check = "--language_of=own_language:language_of"
    for known, flags, message in (
        (("tr",), [check], "does not know the language 'uk', only tr"),
        (("tr", "uk"), [check, "--answer_key=none"], "has no 'none'"),
    ):
        own.language_of.languages = known
        assert arbitrage(*flags) == 2
        error = capsys.readouterr().err
        assert message in error and "prompts.jsonl, line" in error, error
    assert "'prompt', 'language'" in error and "--answer_key" in error
    assert not endpoint.asked
    own.language_of.languages = ("tr",)
    assert arbitrage(check, "--languages=tr").chosen
    assert set(identify.language_of.languages) == set(LANGUAGES)


def test_a_learned_router_asks_one_teacher_for_what_it_has_not_learned_from(arbitrage, endpoint):
    made = arbitrage("--routing=learned", "--subset=0.5", "--tau=0.05")
    both = [
        p
        for p in {p for _, p in endpoint.asked}
        if endpoint.asked["turk", p] and endpoint.asked["ukr", p]
    ]
    assert 2 <= len(both) < 12 and sum(endpoint.asked.values()) == 12 + len(both)
    assert made.chosen == ["turk", "ukr"] * 6
    assert (made.folder / "router.npz").exists() and len(made.pairs) == len(both)
    earlier = f"--router={made.folder / 'router.npz'}"
    reused = arbitrage("--routing=learned", earlier, out="reused", reward=None)
    assert reused.chosen == made.chosen and reused.pairs == []
    assert sum(endpoint.asked.values()) == 24 + len(both)
    by_language = arbitrage("--routing=learned", "--per=language", "--subset=0.5")
    assert by_language.chosen == made.chosen
    asked = sum(endpoint.asked.values())
    assert arbitrage("--routing=learned", "--subset=0.5", "--tau=0.05").bytes() == made.bytes()
    assert sum(endpoint.asked.values()) == asked


def test_a_judge_rewards_by_the_comparisons_that_are_won(arbitrage, endpoint):
    languages = set()

    def judge(prompt, before):
        languages.add(re.search(r"1\. The answer is written in (\w+)", prompt)[1])
        first = prompt.partition("<answer_a>\n")[2].partition("\n")[0]
        second = prompt.partition("<answer_b>\n")[2].partition("\n")[0]
        better = "A" if "?" not in first else "B" if "?" not in second else "neither"
        return f"Comparison: one.\nPreferred: Answer ({better})"

    endpoint.teachers["judge"] = judge
    spec = f"judge:openai:{endpoint.url},model=judge,timeout=5"
    made = arbitrage(teachers=("none", "turk", "ukr"), reward=spec)
    assert made.chosen == ["turk", "ukr"] * 6
    assert {row["reward"] for row in made.sft} == {1.0}
    assert len({row["reward_version"] for row in made.sft}) == 1
    assert languages == {"Turkish", "Ukrainian"}
    asked = endpoint.count("judge")
    assert arbitrage(teachers=("none", "turk", "ukr"), reward=spec).bytes() == made.bytes()
    # Replies that cannot be read are asked for again in one start, up to three times in all.
    assert endpoint.count("judge") == asked


def test_a_checkpoint_teaches_as_generate_writes(arbitrage, trained_run):
    pool = f"  - {{name: own, checkpoint: '{trained_run.path}', max_tokens: 5, batch_size: 8}}\n"
    flags = ("--keep_cut", "--form=prompt", "--routing=single", "--teacher=own", "--seed=7")
    made = arbitrage(*flags, pool=pool)
    settings = Settings(max_new_tokens=5, sampling=Sampling(temperature=0.8, top_p=0.95))
    config = load_run.config_of(trained_run.path)
    rows = [("row", {"text": row["prompt"]}) for row in PROMPTS]
    from espalier.data.aya_expanse import prompts

    read = prompts.read([("row", row) for row in PROMPTS])
    indices = [int(prompt.digest, 16) % 2**32 for prompt in read]
    options = {"settings": settings, "seed": 7, "indices": indices}
    want = list(generate(config, rows, checkpoint=trained_run.path, **options))
    texts = {row["prompt"]: row["text"] for row in want if row["text"].strip()}
    assert {row["prompt"]: row["completion"] for row in made.sft} == texts and texts
    stored = {row["id"]: row for row in made.rows("completions.jsonl")}
    assert len(stored) == 12 and all(row["cost"] == 0 for row in stored.values())
    assert {row["new_tokens"] for row in stored.values()} <= {1, 2, 3, 4, 5}
    # Beside endpoints, in one command; what is there is not generated again.
    mixed = arbitrage("--keep_cut", "--form=prompt", "--seed=7", pool=pool)
    assert mixed.chosen == ["turk", "ukr"] * 6
    assert mixed.summary["teachers"]["own"]["earlier"] == 12


def test_another_content_of_a_template_is_another_teacher(trained_run, tmp_path):
    file = tmp_path / "own.jinja"
    keys = set()
    for text in ("{{ messages[0].content }}", "Q: {{ messages[0].content }}"):
        file.write_text(text)
        teacher = Teacher(
            name="own", kind="checkpoint", where=str(trained_run.path), chat_template=str(file)
        )
        keys.add(json.dumps(at_work(teacher, SamplingFlags()).identity))
    assert len(keys) == 2


def test_a_hugging_face_folder_teaches_and_other_weights_in_it_answer_anew(arbitrage, tmp_path):
    from tests.launch.load.hf_checkpoint_test import write_llama

    folder, other = (write_llama(tmp_path / name, seed=i) for i, name in enumerate(("hf", "new")))
    pool = f"  - {{name: own, hf: '{folder}', max_tokens: 2, batch_size: 8}}\n"
    flags = ("--keep_cut", "--form=prompt", "--routing=single", "--teacher=own", "--languages=tr")

    def answers(expected):
        made = arbitrage(*flags, pool=pool)
        assert made.summary["teachers"]["own"]["earlier"] == expected
        assert not [path for path in made.folder.iterdir() if path.is_dir()]  # no copy
        return {row["key"]: row["completion"] for row in made.sft}

    first = answers(0)
    assert answers(6) == first
    config = folder / "config.json"
    before = config.stat().st_mtime_ns
    shutil.copy(other / "model.safetensors", folder)
    assert config.stat().st_mtime_ns == before
    second = answers(0)
    assert not first.keys() & second.keys() and [*first.values()] != [*second.values()]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--routing=single"], "--teacher=NAME goes with"),
        (["--routing=single", "--teacher=x"], "is not a teacher of the pool"),
        (["--routing=random", "--per=language"], "--per=language is for"),
        (["--routing=fixed"], "names no teacher for 'tr'"),
        (["--languages=de"], "'de' has 0 prompts"),
        (["--per_language=7"], "7 are needed"),
        (["--subset=1"], "between 0 and 1"),
        (["--router=/x"], "--router=FILE is for"),
        (["--routing=learned", "--router=/x"], "/x is not a router"),
        (["--tau=-1", "--routing=learned"], "--tau=-1"),
        (["--temperature=-1"], "--temperature=-1"),
        (["--temperature=0", "--top_p=0.5"], "--top_p has no effect with --temperature=0"),
        (["--subset=0.5"], "--subset is for --routing=learned without --router"),
        (["--tau=0.5", "--routing=random"], "--tau is for --routing=learned without --router"),
        (["--reward=judge:logprob:/x", "--answer_key=k"], "--answer_key is not read by --reward="),
        (["--language_of=nowhere:f"], "that can be imported"),
        (["--reward=best"], "must be exact_answer"),
        (["--reward=judge:x"], "is not a judge"),
        (["--reward=checkpoint:/nowhere"], "/nowhere"),
        (["--answer_key=none"], "--answer_key"),
        (["--missing_end_penalty=1"], "--missing_end_penalty is for cut answers"),
        (["--out=/proc/none/x"], "cannot be created"),
    ],
)
def test_bad_settings_are_errors(arbitrage, capsys, flags, message):
    assert arbitrage(*flags) == 2
    assert message in capsys.readouterr().err


def test_a_pool_that_cannot_work_is_an_error_before_any_request(arbitrage, endpoint, capsys):
    for pool, message in (
        ("  - {name: a, url: 'http://u:p@host/v1', model: m}\n", "has a user"),
        ("  - {name: a, url: 'http://host/v1', model: m, key_env: NO_SUCH_KEY}\n", "NO_SUCH_KEY"),
        ("  - {name: a, checkpoint: /nowhere}\n", "/nowhere"),
        ("  - {name: a, hf: /nowhere}\n", "/nowhere"),
    ):
        assert arbitrage(pool=pool) == 2
        assert message in capsys.readouterr().err
    assert not endpoint.asked
    assert arbitrage("--routing=reward", reward=None) == 2
    assert "needs --reward" in capsys.readouterr().err


def test_a_fuser_sees_all_answers_and_its_own_is_kept(arbitrage, endpoint, capsys):
    def fuse(prompt, before):
        answers = [
            part.partition("\n")[2].partition("\n")[0] for part in prompt.split("Answer ")[1:]
        ]
        return max(answers, key=lambda text: "?" not in text)

    endpoint.teachers["fuser"] = fuse
    teachers = ("turk", "ukr", "fuser")
    made = arbitrage("--routing=fusion", "--fuser=fuser", teachers=teachers)
    assert made.chosen == ["fuser"] * 12
    assert [row["messages"][-1]["content"] for row in made.sft] == [r["answer"] for r in PROMPTS]
    (shown,) = [p for name, p in endpoint.asked if name == "fuser" and "Request:\ntr 3\n" in p]
    assert "Answer 1:\n4\n" in shown and "Answer 2:\n3?\n" in shown and "in Turkish" in shown
    assert endpoint.count("fuser") == endpoint.count("turk") == 12
    assert len(made.pairs) == 12  # best against worst of three
    assert arbitrage("--routing=fusion", "--fuser=fuser", teachers=teachers).bytes() == made.bytes()
    assert endpoint.count("fuser") == 12
    # Without the fuser's answer the best of the others is kept.
    endpoint.teachers["fuser"] = lambda prompt, before: 500
    flags = ("--routing=fusion", "--fuser=fuser", "--attempts=1")
    assert arbitrage(*flags, teachers=teachers, out="other").chosen == ["turk", "ukr"] * 6
    assert arbitrage("--routing=fusion", "--fuser=nobody") == 2
    assert "--fuser=nobody is not a teacher of the pool" in capsys.readouterr().err
    assert arbitrage("--routing=fusion") == 2
    assert "--fuser=NAME goes with" in capsys.readouterr().err
    assert arbitrage("--routing=fusion", "--fuser=turk", teachers=("turk",)) == 2
    assert "no teacher besides --fuser=turk" in capsys.readouterr().err


def test_an_english_answer_is_translated_and_english_prompts_keep_it(
    arbitrage, endpoint, tmp_path, capsys
):
    endpoint.teachers["teach"] = lambda prompt, before: f"answer to {prompt}"
    endpoint.teachers["move"] = lambda prompt, before: (
        f"{prompt.split()[6].rstrip('.')}: {prompt.strip().splitlines()[-1]}"
    )
    flags = ("--routing=translated", "--teacher=teach", "--translator=move")
    teachers, rows = (
        ("teach", "move"),
        [{**row, "english": f"en {row['source_id']}"} for row in PROMPTS],
    )
    rows.append({"prompt": "plain", "language": "en", "answer": "x"})
    assert arbitrage(*flags, teachers=teachers, reward=None) == 2
    assert "no 'english'" in capsys.readouterr().err and not endpoint.asked
    path = tmp_path / "english.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = arbitrage(*flags, f"--prompts={path}", teachers=teachers, reward=None)
    assert made.chosen == ["move"] * 12 + ["teach"]
    texts = [row["messages"][-1]["content"] for row in made.sft]
    assert texts[:2] == ["Turkish: answer to en 0", "Ukrainian: answer to en 0"]
    assert texts[-1] == "answer to plain" and made.sft[0]["messages"][0]["content"] == "tr 0"
    # The English prompt of a request in two languages is asked once.
    assert endpoint.count("teach") == 7 and endpoint.count("move") == 12
    endpoint.teachers["move"] = lambda prompt, before: 500
    made = arbitrage(
        *flags, f"--prompts={path}", "--attempts=1", teachers=teachers, reward=None, out="b"
    )
    assert made.chosen == ["teach"]  # an English answer is none to a prompt in another language
