"""What the small experiment makes of a pool's answers: data of students, pairs, and the worth of routings."""

import collections
import json
import types

import pytest

from espalier.data.aya_expanse import routing
from espalier.launch.papers.aya_expanse import lexicon, small_pool, small_stage

pytest.importorskip("django")
COUNT = 30


def wrong(prompt):
    return " " + lexicon.words(prompt.language)["Monday"] + ", x"


class Pool:
    """Teachers that are right in the languages of their family and in English, but one; elsewhere they write a wrong word."""

    def __init__(self, runs, to, store, *, seed):
        self._names = list(runs)
        self.rewards = small_pool.NoisyRewards(0.0, seed)

        self._answers = {}

    def route(self, name, prompts, teacher=None, *, rewarded=True):
        if rewarded:
            self._answers |= {prompt.id: prompt.columns["answer"] for prompt in prompts}

        def text(teacher, prompt):
            own = (*lexicon.FAMILIES[teacher], *(["en"] if teacher != "germanic" else []))
            if not rewarded:  # the same request in English
                return self._answers[prompt.id.rsplit("-", 2)[0] + "-en"]
            return prompt.columns["answer"] if prompt.language in own else wrong(prompt)

        asked = self._names if teacher is None else [teacher]
        answers = [{one: {"text": text(one, prompt)} for one in asked} for prompt in prompts]
        rewards = (
            self.rewards(prompts, answers)
            if rewarded
            else [dict.fromkeys(asked, 0.0)] * len(prompts)
        )
        chosen = [routing.best(row) for row in rewards]
        if name == "random":
            chosen = [self._names[i % 3] for i in range(len(prompts))]
        made = {"chosen": chosen, "answers": answers, "rewards": rewards, "names": self._names}
        return types.SimpleNamespace(**made)

    translations = small_pool._Pool.translations
    _seed = 5


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(small_pool, "_Pool", Pool)
    flags = types.SimpleNamespace(seed=90)
    monkeypatch.setattr(small_stage, "POOL", COUNT)
    monkeypatch.setattr(small_stage, "TUNING", COUNT)
    monkeypatch.setattr(small_stage, "ONLINE", COUNT // 3)
    small_stage._requests(flags, tmp_path / "requests")
    runs = {name: f"runs/{name}" for name in lexicon.FAMILIES}
    small_pool.answer(tmp_path / "requests/pool.jsonl", runs, tmp_path / "pool", seed=90)

    def rows(name, stage="pool"):
        lines = (tmp_path / stage / f"{name}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    rows.qualities = json.loads((tmp_path / "pool" / small_pool.QUALITIES).read_text())
    return rows


def mean_score(rows, references):
    scores = [
        lexicon.score(row["completion"], references[row["id"]], row["language"]) for row in rows
    ]
    return sum(scores) / len(scores)


def test_students_get_what_their_routing_keeps(files):
    references = {row["id"]: row["answer"] for row in files("pool", "requests")}
    assert mean_score(files("sft_reward"), references) == 1.0
    single, random = (mean_score(files(f"sft_{name}"), references) for name in ("single", "random"))
    assert single == pytest.approx(3 / 7, abs=0.1) and random < 0.7
    translated = files("sft_translated")
    english = [row for row in translated if row["language"] == "en"]
    assert mean_score(english, references) == 1.0
    # The order of letters is another one, and the translator loses words.
    assert 0.4 < mean_score(translated, references) < 0.9
    tenth = files("sft_tenth_slavic")
    assert {row["language"] for row in tenth} == {"cs", "pl"} and len(tenth) == COUNT // 5
    cluster = files("sft_reward_slavic")
    assert {row["language"] for row in cluster} == {"cs", "pl", "en"} and len(cluster) == 3 * COUNT
    harmful, reward = files("sft_harmful"), files("sft_reward")
    texts = [collections.Counter(row["completion"] for row in rows) for rows in (harmful, reward)]
    assert texts[0] == texts[1] and mean_score(harmful, references) < 0.3


def test_pairs_are_as_many_in_one_and_in_seven_languages(files):
    assert {row["language"] for row in files("pairs")} == set(lexicon.LANGUAGES)
    some = {n: files(f"pairs_{n}") for n in small_pool.PAIR_LANGUAGES}
    assert {len(rows) for rows in some.values()} == {len(some[1])} and len(some[1]) > COUNT / 2
    for number, rows in some.items():
        assert {row["language"] for row in rows} <= set(small_pool.PAIR_LANGUAGES[number])
    for row in files("pairs_native"):
        assert row["chosen"] != row["rejected"]
    worse = [lexicon.artefacts(row["rejected"], row["language"]) for row in files("pairs_native")]
    assert sum(worse) / len(worse) > 0.2


def test_qualities_are_exact_scores(files):
    qualities = files.qualities
    assert qualities["single"] in lexicon.FAMILIES
    assert qualities["teachers"]["slavic"]["cs"] == 1.0 > qualities["teachers"]["slavic"]["es"]
    noisy = list(qualities["by_noise"].values())
    assert noisy[0] == 1.0 > noisy[-2] > noisy[-1]
    means = [sum(one.values()) / 7 for one in qualities["teachers"].values()]
    assert qualities["uniform"] == pytest.approx(sum(means) / 3)
    assert noisy[-1] == pytest.approx(
        0.5, abs=0.1
    )  # a draw of the two texts, one right and one wrong
    assert qualities["routings"]["reward"] == dict.fromkeys(lexicon.LANGUAGES, 1.0)


def test_teachers_see_their_family_and_a_tenth_of_the_rest(files):
    rows = files("teacher_germanic", "requests")
    counts = collections.Counter(row["language"] for row in rows)
    assert {counts[code] for code in ("de", "nl", "en")} == {COUNT}
    assert 0 < sum(counts[code] for code in ("es", "it", "cs", "pl")) < 0.3 * 4 * COUNT
    assert {row["language"] for row in files("online_slavic", "requests")} == {"cs", "pl", "en"}
    online, pool = (files(name, "requests") for name in ("online", "pool"))
    assert len(online) == 7 * (COUNT // 3) and len(pool) == 7 * COUNT
    assert not {row["english"] for row in online} & {row["english"] for row in pool}
    assert set(files("dev_cs", "requests")[0]) == {"text", "targets"}
