"""Routing against its definitions: ties, means, subsets; the router's gradient against differences and a limit case."""

import json

import numpy as np
import pytest
import scipy.optimize

from espalier.data.aya_expanse import outputs, pool, prompts, router, routing, second_prompts
from espalier.data.text.documents import DataError

YAML = """
teachers:
  - {name: one, checkpoint: runs/one}
  - {name: two, hf: /models/two, temperature: 0.5, languages: [tr, uk]}
  - {name: three, url: "https://host/v1", model: m, key_env: KEY, prompt_price: 1, new_price: 2.5}
fixed: {tr: two, default: one}
"""


@pytest.fixture
def read_pool(tmp_path):
    def read(text):
        (tmp_path / "pool.yaml").write_text(text)
        return pool.read(tmp_path / "pool.yaml")

    return read


def asked(text, language="tr", **columns):
    row = {"prompt": text, "language": language, **columns}
    (prompt,) = prompts.read([("row 1", row)])
    return prompt


def test_a_pool_is_read_in_order(read_pool):
    made = read_pool(YAML)
    assert list(made.teachers) == ["one", "two", "three"]
    assert made.teachers["two"].kind == "hf" and made.teachers["two"].temperature == 0.5
    three = made.teachers["three"]
    assert three.cost(1000, 100) == (1000 * 1 + 100 * 2.5) / 1e6
    assert three.cost(None, 100) is None and made.teachers["one"].cost(None, None) == 0
    assert [t.name for t in routing.able(made, "de")] == ["one", "three"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("teachers: []", "at least one teacher"),
        ("teachers: [{name: a}]", "give one of checkpoint, hf, url"),
        ("teachers: [{name: a, hf: x, url: y}]", "give one of"),
        ("teachers: [{hf: x}]", "'name' is missing"),
        ("teachers: [{name: a, hf: x}, {name: a, hf: y}]", "two teachers have the name 'a'"),
        ("teachers: [{name: a, hf: x, temprature: 1}]", "did you mean 'temperature'"),
        ("teachers: [{name: a, hf: x, temperature: hot}]", "must be a number of at least 0"),
        ("teachers: [{name: a, hf: x, temperature: .nan}]", "must be a number"),
        ("teachers: [{name: a, hf: x, top_p: 2}]", "at most 1"),
        ("teachers: [{name: a, hf: x, max_tokens: 1.5}]", "a whole number"),
        ("teachers: [{name: a, hf: x, model: m}]", "'model' is for url"),
        ("teachers: [{name: a, url: x}]", "needs 'model'"),
        ("teachers: [{name: a, url: x, model: m, key: s}]", "would write the key into a file"),
        ("teachers: [{name: a, hf: x, languages: [no]}]", "Write it in quotes"),
        ("teachers: [{name: a, hf: x}]\nfixed: {tr: b}", "has no teacher 'b'"),
        (
            "teachers: [{name: a, hf: x, languages: [uk]}]\nfixed: {tr: a}",
            "do not include 'tr'",
        ),
        ("teachers: [", "is not YAML"),
        ("!!python/object/apply:os.system [ls]", "is not YAML"),
        ("[" * 2000, "is not YAML"),
        ("a: &a [x]\nb: &b [*a, *a]\nteachers: [*b]", "unknown key"),
    ],
)
def test_a_bad_pool_is_named(read_pool, text, message):
    with pytest.raises(DataError, match=message):
        read_pool(text)


def test_prompts_are_read_by_language():
    rows = [
        ("row 1", {"prompt": "bir", "language": "tr", "answer": "1", "teacher": "x"}),
        ("row 2", {"messages": [{"role": "user", "content": "one"}], "language": "en", "id": 7}),
        ("row 3", {"text": "iki", "language": "tr"}),
        ("row 4", {"text": "bir", "language": "tr"}),  # the first again
    ]
    made = prompts.read(rows)
    assert [p.where for p in made] == ["row 1", "row 2", "row 3"]
    assert made[0].columns == {"answer": "1"} and made[1].id == "7"
    assert made[0].messages == [{"role": "user", "content": "bir"}]
    assert [p.where for p in prompts.read(rows, languages=["tr"], per_language=1)] == ["row 1"]
    with pytest.raises(DataError, match="'de' has 0 prompts"):
        prompts.read(rows, languages=["tr", "de"])
    with pytest.raises(DataError, match="'en' has 1 prompts; 2 are needed"):
        prompts.read(rows, per_language=2)
    (found,) = prompts.read([("row 1", {"prompt": "x"})], language_of=lambda text: "fr")
    assert found.language == "fr"
    assert prompts.read([("row 1", {"prompt": "x"})])[0].language == prompts.UNKNOWN


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "no 'prompt'"),
        ({"prompt": " "}, "is empty"),
        ({"prompt": []}, "is empty"),
        ({"prompt": 3}, "is a int"),
        ({"prompt": "x", "language": 3}, "must be a code"),
        ({"prompt": "x", "id": [1]}, "must be a text or a whole number"),
        ({"prompt": "\ud800"}, "row 1"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "Remove that turn"),
        ({"messages": [{"role": "user", "content": [1]}]}, "no text as 'content'"),
    ],
)
def test_a_bad_prompt_is_named(row, message):
    with pytest.raises(DataError, match=message):
        prompts.read([("row 1", row)])


def test_two_prompts_of_one_id_are_an_error():
    rows = [("row 1", {"prompt": "x", "id": "a"}), ("row 2", {"prompt": "y", "id": "a"})]
    with pytest.raises(DataError, match="row 2 and row 1 have the same id"):
        prompts.read(rows)


def test_random_routing_is_uniform_and_a_function_of_seed_and_prompt(read_pool):
    made = read_pool(YAML)
    drawn = [routing.random(made, asked(f"p{i}"), seed=1) for i in range(3000)]
    assert drawn == [routing.random(made, asked(f"p{i}", id=i), seed=1) for i in range(3000)]
    shares = [drawn.count(name) / 3000 for name in made.teachers]
    np.testing.assert_allclose(shares, 1 / 3, atol=0.04)  # 4.6 standard errors
    other = [routing.random(made, asked(f"p{i}"), seed=2) for i in range(3000)]
    assert np.mean([a == b for a, b in zip(drawn, other, strict=True)]) < 0.4
    # Only teachers of the language.
    assert {routing.random(made, asked(f"p{i}", "de"), seed=1) for i in range(50)} == {
        "one",
        "three",
    }


def test_fixed_and_single_routing(read_pool):
    made = read_pool(YAML)
    assert (
        routing.fixed(made, asked("x")) == "two" and routing.fixed(made, asked("x", "de")) == "one"
    )
    assert routing.single(made, "two", asked("x")) == "two"
    with pytest.raises(DataError, match="not asked in 'de'"):
        routing.single(made, "two", asked("x", "de"))
    with pytest.raises(DataError, match="is not a teacher of the pool"):
        routing.single(made, "four", asked("x"))
    without = read_pool(YAML.replace("default: one", "uk: two"))
    with pytest.raises(DataError, match="names no teacher for 'de'"):
        routing.fixed(without, asked("x", "de"))
    alone = read_pool("teachers: [{name: a, hf: x, languages: [uk]}]")
    with pytest.raises(DataError, match="No teacher of the pool is asked in 'tr'"):
        routing.able(alone, "tr")


def test_tags_of_one_language_are_one_language(read_pool):
    made = read_pool("""
teachers:
  - {name: a, hf: x, languages: [pt, he]}
  - {name: b, hf: y}
fixed: {pt: a, iw: a, SW_KE: b, default: b}
""")
    for tag in ("pt", "pt-BR", "por_Latn", "Portuguese", "iw", "he-IL"):
        assert [teacher.name for teacher in routing.able(made, tag)] == ["a", "b"], tag
        assert routing.fixed(made, asked("x", tag)) == "a", tag
        assert routing.single(made, "a", asked("x", tag)) == "a"
    assert routing.fixed(made, asked("x", "es")) == "b" and made.fixed["sw"] == "b"
    rows = [
        (f"row {i}", {"prompt": f"p{i}", "language": tag})
        for i, tag in enumerate(("pt-BR", "tr", "pt", "sw-KE"))
    ]
    read = prompts.read(rows, languages=["por", "sw"])
    assert [prompt.language for prompt in read] == ["pt-BR", "pt", "sw-KE"]  # as written
    assert len(prompts.read(rows, languages=["pt"], per_language=1)) == 1
    tags = ("pt-BR", "pt", "por")
    rewards = [{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 3.0}, {"a": 1.0, "b": 0.0}]
    order = routing.best_by_language([asked("x", tag) for tag in tags], rewards, "ab")
    assert [order.get(tag) for tag in (*tags, "pt-PT", "tr")] == [["b", "a"]] * 4 + [None]
    features_ND = router.features(["x"] * 3, tags).toarray()
    assert (features_ND == features_ND[0]).all()


def test_a_second_model_is_not_asked_for_an_unknown_language():
    prompt = asked("x", prompts.UNKNOWN, english="y")
    text = second_prompts.fusion(prompt, {"a": "z"}).prompt
    assert "unknown" not in text and "in its own language" in text
    with pytest.raises(DataError, match="row 1: no 'language', into which"):
        second_prompts.in_english(prompt)


def test_equal_rewards_go_to_the_first_and_pairs_are_ordered():
    assert routing.best({"a": 1.0, "b": 1.0}) == "a" and routing.worst({"a": 1.0, "b": 1.0}) == "b"
    rewards = {"a": 0.5, "b": 2.0, "c": -1.0, "d": 2.0}
    assert routing.pair(rewards, dict.fromkeys(rewards, "") | {"c": "x"}) == ("b", "c")
    assert routing.pair({"a": 1.0, "b": 1.0}, {"a": "x", "b": "y"}) is None
    assert routing.pair({"a": 1.0, "b": 0.0}, {"a": "x", "b": "x"}) is None
    assert routing.pair({"a": 1.0}, {"a": "x"}) is None


def test_the_mean_reward_of_routed_answers_is_no_less_than_that_of_any_teacher():
    rng = np.random.default_rng(0)
    rewards = [dict(zip("abc", map(float, row), strict=True)) for row in rng.normal(size=(200, 3))]
    routed = np.mean([row[routing.best(row)] for row in rewards])
    assert all(routed >= np.mean([row[name] for row in rewards]) for name in "abc")
    asked_in = [asked(f"p{i}", "tr" if i % 2 else "uk") for i in range(200)]
    order = routing.best_by_language(asked_in, rewards, list("abc"))
    for language, names in order.items():
        own = [r for p, r in zip(asked_in, rewards, strict=True) if p.language == language]
        means = [np.mean([row[name] for row in own]) for name in names]
        assert means == sorted(means, reverse=True)
    ties = routing.best_by_language(asked_in[:1], [{"b": 1.0, "a": 1.0}], list("abc"))
    assert ties["uk"] == ["a", "b"]


def test_a_routers_targets_sum_to_one_and_tend_to_the_best_teacher():
    rewards = [{"a": 1.0, "b": 0.5, "c": 0.2}, {"b": 3.0, "c": 3.0}, {"c": -1e9}]
    p_NK = router.targets(rewards, "abc", tau=0.7)
    np.testing.assert_allclose(p_NK.sum(1), 1, atol=1e-6)
    want = np.exp(np.array([1.0, 0.5, 0.2]) / 0.7)
    np.testing.assert_allclose(p_NK[0], want / want.sum(), atol=1e-12)
    np.testing.assert_allclose(p_NK[1], [0, 0.5, 0.5], atol=1e-12)
    limit = router.targets([{"a": 1.0, "b": 0.9}], "ab", tau=1e-3)
    np.testing.assert_allclose(
        limit, router.targets([{"a": 1.0, "b": 0.9}], "ab", tau=0), atol=1e-6
    )
    np.testing.assert_array_equal(router.targets([{"b": 1.0, "a": 1.0}], "ab", tau=0), [[1, 0]])
    with pytest.raises(ValueError, match="--tau=-1"):
        router.targets(rewards, "abc", tau=-1)


def test_the_routers_loss_is_the_divergence_and_its_gradient_that_of_differences():
    texts, languages = ["abab", "cdcd", "abcd"], ["tr", "uk", "tr"]
    features_ND = router.features(texts, languages)
    columns = np.unique(features_ND.nonzero()[1])[:6]  # the others have no gradient
    p_NK = router.targets([{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 2.0}, {"a": 1.0}], "ab", tau=1.0)
    rng = np.random.default_rng(0)
    small = features_ND[:, columns]
    weights = rng.normal(size=(6, 2))
    value, gradient = router.loss(weights, small, p_NK, penalty=0.3)
    logits = small @ weights
    pi = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    terms = np.where(p_NK > 0, p_NK * np.log(np.where(p_NK > 0, p_NK, 1) / pi), 0)
    np.testing.assert_allclose(value, terms.sum(1).mean() + 0.15 * (weights**2).sum(), rtol=1e-12)
    wrong = scipy.optimize.check_grad(
        lambda w: router.loss(w.reshape(6, 2), small, p_NK, penalty=0.3)[0],
        lambda w: router.loss(w.reshape(6, 2), small, p_NK, penalty=0.3)[1],
        weights.ravel(),
    )
    assert wrong < 1e-6 and len(gradient) == 12


def test_a_router_learns_which_teacher_is_best_for_new_prompts_and_survives_storage(tmp_path):
    kinds = {"tr": ("sum", "a"), "uk": ("song", "b")}
    texts, languages, rewards = [], [], []
    for i in range(40):
        for language, (word, teacher) in kinds.items():
            texts.append(f"{word} {i}")
            languages.append(language)
            rewards.append({"a": float(teacher == "a"), "b": float(teacher == "b")})
    p_NK = router.targets(rewards, "ab", tau=0.1)
    made = router.fit(texts, languages, p_NK, "ab")
    again = router.fit(texts, languages, p_NK, "ab")
    np.testing.assert_array_equal(made.weights_DK, again.weights_DK)
    for language, (word, teacher) in kinds.items():
        probs = np.exp(made.log_probs([f"{word} 99"], [language])[0])
        assert probs["ab".index(teacher)] > 0.9
    made.save(tmp_path / "r.npz")
    loaded = router.load(tmp_path / "r.npz")
    assert loaded.names == ("a", "b")
    np.testing.assert_array_equal(loaded.weights_DK, made.weights_DK)
    (tmp_path / "r.npz").write_bytes(b"PK\x03\x04garbage")
    with pytest.raises(DataError, match="is not a router"):
        router.load(tmp_path / "r.npz")


def test_the_subset_has_the_wanted_share():
    inside = [routing.in_subset(asked(f"p{i}"), 0.25, seed=3) for i in range(4000)]
    np.testing.assert_allclose(np.mean(inside), 0.25, atol=0.03)


def test_rows_have_their_provenance_and_the_forms_that_training_reads():
    from espalier.data.chats import tasks
    from espalier.data.preference import records as pairs

    prompt = asked("bir?", answer="1", source_id="s")
    answer = {"text": "Bir.", "key": "k", "settings": {"seed": 0}, "cost": 0.5, "new_tokens": 2}
    other = {**answer, "text": "Iki.", "key": "l"}
    for form in ("messages", "prompt"):
        row = outputs.sft_row(prompt, "one", answer, form=form, reward=1.0)
        assert (row["teacher"], row["cost"], row["key"], row["reward"]) == ("one", 0.5, "k", 1.0)
        assert row["answer"] == "1" and row["source_id"] == "s" and row["language"] == "tr"
        kind, record = tasks.parse(json.loads(json.dumps(row)), "row", "id")
        assert kind == form
        pair = outputs.pair_row(
            prompt, {"one": answer, "two": other}, {"one": 0.0, "two": 1.0}, form=form
        )
        record = pairs.parse(json.loads(json.dumps(pair)), "row", "id")
        assert record.is_chat == (form == "messages")
        assert (pair["chosen_teacher"], pair["rejected_teacher"]) == ("two", "one")
    assert outputs.pair_row(prompt, {"one": answer}, {"one": 0.0}, form="prompt") is None


def test_the_table_counts_by_language_and_teacher():
    asked_in = [asked("a"), asked("b"), asked("c", "uk")]
    answer = {"text": "x", "cost": 0.25, "new_tokens": 4}
    answers = [{"one": answer, "two": answer}, {"one": answer}, {"two": {**answer, "cost": None}}]
    rows = outputs.table(
        asked_in,
        ["two", None, "two"],
        answers,
        [{"one": 1.0, "two": 3.0}, {}, {"two": 2.0}],
        [{}, {"one": "cut", "two": "no answer"}, {"one": "no answer"}],
        ["one", "two"],
    )
    by = {(row["language"], row["teacher"]): row for row in rows}
    assert by["tr", "one"] == {
        **{"language": "tr", "teacher": "one", "asked": 2, "chosen": 0.0, "reward": 1.0},
        **{"new_tokens": 4.0, "cost": 0.5, "cut": 1},
    }
    assert by["tr", "two"]["chosen"] == 1.0 and by["tr", "two"]["no answer"] == 1
    assert by["uk", "two"]["cost"] is None and by["uk", "one"]["asked"] == 1
    text = outputs.markdown(rows)
    assert "| uk | two | 1 | 100.0% | 2 | 4 | 0 | 0 | unknown |" in text
