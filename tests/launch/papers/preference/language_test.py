"""Preferences of the generated language: who judges them, and what a policy still knows."""

import types

import jax
import numpy as np
import pytest

from espalier.data.tokenizers import vocabularies
from espalier.launch.inference import generate
from espalier.launch.papers.preference import pairs, recall, topic_language
from espalier.launch.papers.preference.topic_reward import TopicReward
from espalier.trainers.rewards.base import Completion

PROMPT = topic_language.prompts("train")[0]
WANTED = topic_language.preferred(PROMPT[1])
OTHER = next(x for x in topic_language.LANGUAGE_A if x not in WANTED)
STRANGE = topic_language.LANGUAGE_B[0]


@pytest.fixture(scope="module")
def vocabulary():
    return vocabularies.characters(symbols=topic_language.symbols())


def test_a_completion_is_worth_what_its_text_is(vocabulary):
    texts = {WANTED[:2] + OTHER: 3.0, OTHER + STRANGE: -2.0, OTHER + OTHER: -2.0, "": -4.0}
    completions = [
        Completion(prompt=vocabulary.encode(PROMPT), tokens=vocabulary.encode(text), ended=True)
        for text in texts
    ]
    cut = Completion(
        prompt=vocabulary.encode(PROMPT), tokens=vocabulary.encode(WANTED[0]), ended=False
    )
    found = TopicReward(vocabulary=vocabulary)([*completions, cut])
    assert found.dtype == np.float32
    assert found.tolist() == pytest.approx([*texts.values(), 1.0])


def sample(text, ended="eos"):
    return {"prompt": PROMPT, "text": text, "ended": ended}


def test_the_judge_orders_each_two_by_bradley_and_terry_and_pairs_best_with_worst():
    count, rng = 4000, np.random.default_rng(0)
    good, bad = sample(WANTED[0] + WANTED[1]), sample(STRANGE)
    found = list(pairs.judge([sample(WANTED[0]), bad, bad, good] * count, rng))
    share = np.mean([row["chosen"] == good["text"] for row in found])
    # Plackett and Luce: the chance to be first is a softmax of the rewards.
    weights = np.exp([1.5, -4.0, -4.0, 3.0])
    expected = weights[3] / weights.sum()
    assert share == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / count))
    assert {(row["chosen"], row["chosen_reward"]) for row in found} >= {
        (WANTED[0], 1.5),
        (good["text"], 3.0),
    }
    certain = [sample(WANTED[:4]), sample(OTHER), sample(OTHER), sample("", "length")]
    draws = list(pairs.judge(certain * 50, rng))  # 6 and -4, with two of 0 between them
    assert sum((x["chosen"], x["rejected"]) == (WANTED[:4], "") for x in draws) > 40


def test_prompts_of_pairs_are_those_of_their_split():
    held_out, train = pairs.prompts("validation"), pairs.prompts("train")
    assert sorted(held_out) == sorted(topic_language.prompts("validation"))
    assert len(train) == pairs.TRAIN_PAIRS and set(train) == set(topic_language.prompts("train"))
    assert not set(train) & set(held_out)


def test_pairs_are_written_by_split(tmp_path, monkeypatch):
    import json

    asked = []

    def samples(run, rows, **settings):
        asked.append(settings)
        for i, (_, row) in enumerate(rows):
            for text in (f"{WANTED[i % 6]}", *[OTHER] * (settings["settings"].num_samples - 1)):
                yield {"prompt": row["text"], "text": text, "ended": "eos"}

    monkeypatch.setattr(generate, "generate", samples)
    flags = types.SimpleNamespace(to=str(tmp_path / "made"), checkpoint="c", params="raw", seed=3)

    class Start:
        def __call__(self):
            return None

    start = Start()
    start.flags = flags
    pairs.run(start)
    found = {
        split: [json.loads(line) for line in (tmp_path / "made" / name).read_text().splitlines()]
        for split, name in pairs.FILES.items()
    }
    assert {split: len(rows) for split, rows in found.items()} == {"train": 2048, "validation": 256}
    for split, rows in found.items():
        assert [row["prompt"] for row in rows] == pairs.prompts(split)
    of_pairs, of_many = asked
    for one, count in ((of_pairs, pairs.JUDGED), (of_many, 1 + max(pairs.SIZES))):
        assert (one["checkpoint"], one["seed"], one["settings"].num_samples) == ("c", 3, count)
        assert one["settings"].max_new_tokens == topic_language.LONGEST + 1
    assert (of_pairs["settings"].sampling.temperature, of_pairs["settings"].sampling.top_p) == (
        1,
        None,
    )
    assert (of_many["settings"].sampling.temperature, of_many["settings"].sampling.top_p) == (
        0.5,
        0.75,
    )
    best = json.loads((tmp_path / "made" / pairs.BEST_OF).read_text())
    assert list(best) == ["1", "2", "4", "8", "16", "32"] and best["1"] == best["32"] < 0.5


def test_facts_are_known_where_the_whole_answer_is_said(vocabulary, monkeypatch):
    facts = topic_language.facts()
    made = {}

    class Generator:
        def __init__(self, model, prompts, settings, *, batch_size, sharding, seed):
            made.update(prompts=prompts, settings=settings, batch_size=batch_size)

        def __call__(self, params, step):
            """Right for the first `params` prompts; then wrong, without an end, and with more after the answer."""
            right = [[*vocabulary.encode(answer), 1] for answer in facts.values()]
            wrong = ([0, 0, 0, 1], right[params + 1][:-1], [*right[params + 2][:-1], 5])
            return [*right[:params], *wrong, *[[1]] * (len(right) - params - 3)]

    monkeypatch.setattr(recall, "Generator", Generator)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    policy = types.SimpleNamespace(inference_part="")
    run = types.SimpleNamespace(
        program=types.SimpleNamespace(
            recipe=types.SimpleNamespace(language_model=policy), batch_sharding=sharding
        ),
    )
    hook = recall.FactRecall(run=run, vocabulary=vocabulary, start_token=0)
    assert made["prompts"] == [[0, *vocabulary.encode(prompt)] for prompt in facts]
    assert made["batch_size"] == len(facts) == 72
    assert made["settings"].sampling.temperature == 0 and made["settings"].eos_ids == (1,)
    for known in (0, 18, 60):
        found = hook(20, types.SimpleNamespace(released_params=known), {})
        assert found == {"facts/accuracy": known / 72}
    recall.FactRecall(run=run, vocabulary=vocabulary, start_token=None)
    assert made["prompts"] == [vocabulary.encode(prompt) for prompt in facts]


def test_online_methods_have_one_rate_and_as_many_completions():
    from espalier.launch.config import gin_config
    from espalier.launch.sweep import file as sweep_file

    runs = {run.arm: run for run in sweep_file.read("launch/papers/preference/experiment.py:1")}
    for method in ("online_dpo", "rloo", "grpo", "ppo"):
        run = runs[method]
        config = gin_config.load(
            run.gin_files,
            [*run.bindings, "MODEL_DIR=/x", "INITIAL_CHECKPOINT_PATH=/y"],
            entry="espalier.launch.train:train",
        )
        set_to = {**config.macros, **({"SAMPLES": 2} if method == "online_dpo" else {})}
        rollouts = set_to["TRAIN_STEPS"] // set_to["UPDATES"]
        assert set_to["LEARNING_RATE"] == 1e-3
        assert rollouts * set_to["PROMPTS"] * set_to["SAMPLES"] == 25_600, method
