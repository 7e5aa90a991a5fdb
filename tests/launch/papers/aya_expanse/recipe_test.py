"""The recipe of Aya Expanse: its arms as gin has them, and the stages that train nothing."""

import dataclasses
import json
import pathlib
import types

import numpy as np
import pytest
import yaml

from espalier.data.aya_expanse import prompts
from espalier.data.text.documents import DataError
from espalier.launch import cli
from espalier.launch.aya_expanse import arbitrage_rewards
from espalier.launch.config import gin_config
from espalier.launch.evaluate.judges import pairwise
from espalier.launch.merge import __main__ as merge
from espalier.launch.merge import search
from espalier.launch.papers.aya_expanse import lexicon, small_answers, win_rates
from espalier.launch.papers.aya_expanse import recipe as recipes
from espalier.launch.papers.aya_expanse import stage as aya_expanse_stage
from espalier.launch.prepare.best_of_n import RewardFlags
from espalier.launch.sweep import file
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.checkpoints.array_files import StoredArray

CLUSTERS = {"turkic": ["tr"], "slavic": ["uk"]}
PROMPTS = [
    {"prompt": f"{language} {i}", "language": language, "answer": "x", "origin": origin}
    for language in ("tr", "uk", "en")
    for origin in ("native", "translated")
    for i in range(2)
]


@pytest.fixture
def write(trained_run, tmp_path):
    """Writes a recipe; returns its path."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))

    def run(**changes):
        row = {
            "base": trained_run.path,
            "chats": str(tmp_path / "chats"),
            "prompts": str(tmp_path / "prompts.jsonl"),
            "held_out": str(tmp_path / "prompts.jsonl"),
            "clusters": CLUSTERS,
            "shared": ["en"],
            **changes,
        }
        row = {key: value for key, value in row.items() if value is not None}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(row))
        return str(path)

    return run


def sweep(path):
    return {run.arm: run for run in file.read(f"launch/papers/aya_expanse/recipe.py:{path}")}


def test_every_stage_starts_from_the_merge_before_it_which_is_its_reference(write):
    arms = sweep(write(rounds=2, samples=6, pair_gap=0.25))
    order = list(arms)
    assert order.index("arbitrage") < order.index("merged") < order.index("round1_turkic")
    before = {"dpo": "merged", "round1": "merged_dpo", "round2": "merged_round1"}
    for kind, parent in before.items():
        for cluster in CLUSTERS:
            run = arms[f"{kind}_{cluster}"]
            assert run.parent == f"{parent}/seed0"
            given = [*run.bindings, "MODEL_DIR='/run'", "INITIAL_CHECKPOINT_PATH='/before'"]
            config = gin_config.load(run.gin_files, given, entry="espalier.launch.train:train")
            assert config.macros["REFERENCE"] == "/before"
            if kind != "dpo":
                inputs = config.arguments()["recipe"].inputs
                assert (inputs.samples, inputs.gap, inputs.reference) == (6, 0.25, True)
    assert set(arms["merged_round2"].made_of) == {"round2_turkic", "round2_slavic"}
    assert list(arms["rounds"].made_of) == [
        "merged",
        "merged_dpo",
        "merged_round1",
        "merged_round2",
    ]
    assert "PAIRS='{arbitrage}/pairs_slavic.jsonl'" in arms["dpo_slavic"].bindings
    assert set(arms["dpo_slavic"].above) == {"merged/seed0", "arbitrage/seed0"}
    for name in ("sft_turkic", "arbitrage_slavic"):
        run = arms[name]
        assert run.parent is None
        given = [*run.bindings, "MODEL_DIR='/run'"]
        config = gin_config.load(run.gin_files, given, entry="espalier.launch.train:train")
        assert config.arguments()["total_steps"] == 500


def test_a_polish_follows_the_first_merge_at_a_tenth_of_the_rate(write):
    arms = sweep(write(polish=40, rounds=1))
    assert arms["polished"].parent == "merged/seed0" and "polished" not in sweep(write())
    assert {arms[f"dpo_{cluster}"].parent for cluster in CLUSTERS} == {"polished/seed0"}
    assert next(iter(arms["rounds"].made_of)) == "polished"
    rates = {}
    for name in ("polished", "sft_turkic"):
        given = [*arms[name].bindings, "MODEL_DIR='/run'", "INITIAL_CHECKPOINT_PATH='/before'"]
        given = dict(one.split("=", 1) for one in given)
        given = [f"{key}={value}" for key, value in given.items()]
        config = gin_config.load(arms[name].gin_files, given, entry="espalier.launch.train:train")
        rates[name] = config.macros["LEARNING_RATE"]
        assert config.arguments()["total_steps"] == (40 if name == "polished" else 500)
        if name == "polished":
            assert config.value("schedules.cosine.final_fraction") == 0.05
    assert rates["polished"] == pytest.approx(rates["sft_turkic"] / 10)


def test_a_polish_at_rate_zero_leaves_the_merge_bit_for_bit(
    write, branches, train, tmp_path, monkeypatch
):
    merged, rows = tmp_path / "merged", [{"prompt": "say a", "completion": " b"}] * 8
    assert run("merge", write(), merged, ("runs", branches.folders[:2])) == 0
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rate in (("still", 0.0), ("moved", 1e-3)):
        trained = train(
            f"--gin_file={merged}/model.json",
            *(
                f"--gin_file=t5x_configs/experiments/aya_expanse/{x}.gin"
                for x in ("polish", "vocabulary_base")
            ),
            f"--gin.BASE={str(merged)!r}",
            f"--gin.INITIAL_CHECKPOINT_PATH={str(merged)!r}",
            f"--gin.MODEL_DIR={str(tmp_path / name)!r}",
            f"--gin.CHATS={str(tmp_path / 'chats.jsonl')!r}",
            f"--gin.LEARNING_RATE={rate}",
            *("--gin.TRAIN_STEPS=2", "--gin.BATCH_SIZE=8", "--gin.CHATS_VALIDATION_FRACTION=0.0"),
            "--gin.TASK_FEATURE_LENGTHS={'targets': 16}",
            "--gin.train.train.eval_stream=None",
        )
        assert trained.status == 0, trained.err
    before, still, moved = (
        _arrays(path) for path in (merged, tmp_path / "still", tmp_path / "moved")
    )
    assert before.keys() == still.keys() and before
    assert all(np.array_equal(before[name], still[name]) for name in before)
    assert not all(np.array_equal(before[name], moved[name]) for name in before)
    # So the references have the same loss, to the rounding of two configurations.
    monkeypatch.setattr(small_answers, "HELD_OUT", 2)
    one, same = (small_answers.score(str(path)) for path in (merged, tmp_path / "still"))
    assert same["loss"] == pytest.approx(one["loss"], rel=1e-3)
    assert {*one["kinds"]} == set(lexicon.KINDS) and len(one["judge"]["en"]) == 2


def _arrays(path):
    """The parameters of a run's newest step by name, as their bits."""
    step = step_dir.resolve(str(path))
    manifest = step_dir.read_manifest(step)
    return {
        name: StoredArray(step, name).read().view(np.uint8)
        for name in manifest.arrays
        if name.startswith("params/")
    }


def test_a_reward_model_reaches_the_online_rounds_and_a_judge_cannot(write):
    arms = sweep(write(reward="checkpoint:/rm", bindings=["BATCH_SIZE=8"]))
    run = arms["round3_turkic"]
    assert {"REWARD_CHECKPOINT='/rm'", "BATCH_SIZE=8"} <= set(run.bindings)
    assert "t5x_configs/methods/preference/reward_checkpoint.gin" in run.gin_files
    with pytest.raises(file.SweepError, match="need an exact scorer"):
        sweep(write(reward="judge:openai:http://host/v1,model=m"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": None}, "'base' is missing"),
        ({"clusters": []}, "'clusters' is"),
        ({"steps": {"sft": 1}}, "'steps' is"),
        ({"samples": 1}, "'samples' is 1"),
        ({"pair_gap": -0.1}, "'pair_gap' is -0.1"),
        ({"origin": "both of them"}, "'origin' is"),
        ({"bindings": "X=1"}, "'bindings' is"),
        ({"roundz": 1}, "did you mean 'rounds'"),
    ],
)
def test_a_bad_recipe_is_named(write, changes, message):
    with pytest.raises(recipes.RecipeError, match=message):
        recipes.read(write(**changes))


def test_further_teachers_are_a_pool_whose_names_are_no_arms(write, tmp_path):
    pool = tmp_path / "pool.yaml"
    pool.write_text("teachers: [{name: sft_slavic, checkpoint: runs/x}]")
    with pytest.raises(recipes.RecipeError, match="'sft_slavic' is the name of a cluster's model"):
        recipes.read(write(teachers=str(pool)))
    pool.write_text("teachers: [{name: large, url: 'http://host/v1'}]")
    with pytest.raises(DataError, match="an endpoint needs 'model'"):
        recipes.read(write(teachers=str(pool)))


def run(name, path, to, *flags):
    return cli.status_of(
        lambda: aya_expanse_stage._run(_flags(stage=name, recipe=path, to=str(to), flags=flags))
    )


def _flags(*, stage, recipe, to, flags):
    settings = {"runs": [], "prompts": None, "seed": 0, **dict(flags)}
    return types.SimpleNamespace(stage=stage, recipe=recipe, to=to, **settings)


def rows(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


@pytest.mark.parametrize(("origin", "count"), [("native", 2), ("translated", 2), ("both", 4)])
def test_prompts_are_of_an_origin_and_shared_languages_are_in_every_cluster(
    write, tmp_path, origin, count
):
    assert run("prompts", write(origin=origin), tmp_path / "p") == 0
    for cluster, languages in CLUSTERS.items():
        own = rows(tmp_path / f"p/{cluster}.jsonl")
        assert {row["language"] for row in own} == {*languages, "en"}
        assert len(own) == 2 * count


def test_a_language_without_a_prompt_is_named(write, tmp_path):
    with pytest.raises(recipes.RecipeError, match="no prompt of origin native in cs, pl: add"):
        flags = _flags(
            stage="prompts",
            recipe=write(clusters={"slavic": ["cs", "uk", "pl"]}),
            to=str(tmp_path / "p"),
            flags=(),
        )
        aya_expanse_stage._run(flags)


def asked_prompts(write, tmp_path, *languages, **changes):
    """Runs the stage `prompts` on a prompt in each language."""
    written = [{"prompt": f"p{i}", "language": tag} for i, tag in enumerate(languages)]
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    recipe = write(prompts=str(path), **changes)
    flags = _flags(stage="prompts", recipe=recipe, to=str(tmp_path / "p"), flags=())
    aya_expanse_stage._run(flags)


def test_prompts_are_in_the_cluster_of_their_language_or_refused(write, tmp_path):
    clusters = {"romance": ["pt"], "semitic": ["iw"]}
    asked_prompts(write, tmp_path, "pt-BR", "he", "EN", clusters=clusters)
    for cluster, tags in (("romance", ["pt-BR", "EN"]), ("semitic", ["he", "EN"])):
        assert [row["language"] for row in rows(tmp_path / f"p/{cluster}.jsonl")] == tags
    for tag in ("sw", None):
        message = rf"other.jsonl, line 4: the language {tag!r} is in no cluster"
        with pytest.raises(recipes.RecipeError, match=message):
            asked_prompts(write, tmp_path, "pt-BR", "he", "en", tag, clusters=clusters)


def test_a_run_of_a_sweep_has_the_name_of_its_arm():
    assert (
        aya_expanse_stage._name("runs/sft_turkic/seed0")
        == aya_expanse_stage._name("runs/sft_turkic")
        == "sft_turkic"
    )
    assert aya_expanse_stage._name("/x/runs/merged/seed10/made") == "merged"


def test_runs_are_merged_with_equal_weights(write, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(merge, "main", lambda argv: calls.append(argv) or 0)
    assert run("merge", write(), tmp_path / "m/seed0", ("runs", ["/a", "/b"])) == 0
    ((config, out),) = calls
    made = yaml.safe_load(pathlib.Path(config.removeprefix("--config=")).read_text())
    assert made["merge_method"] == "linear" and out == f"--out={tmp_path / 'm/seed0'}"
    assert [model["model"] for model in made["models"]] == ["/a", "/b"]
    assert {model["parameters"]["weight"] for model in made["models"]} == {1.0}


def test_runs_teach_by_cluster_and_are_compared_by_round(write, tmp_path, branches, trained_run):
    judge = f"judge:logprob:{trained_run.path}"
    pool = tmp_path / "pool.yaml"
    pool.write_text(f"teachers: [{{name: further, checkpoint: '{branches.folders[2]}'}}]")
    settings = {"form": "prompt", "keep_cut": True, "max_new_tokens": 4, "batch_size": 8}
    settings["opponent"] = branches.folders[2]
    path = write(reward=judge, teachers=str(pool), **settings)
    assert run("prompts", path, tmp_path / "p") == 0
    teachers = ("runs", branches.folders[:2])
    prompts = ("prompts", str(tmp_path / "p"))
    assert run("arbitrage", path, tmp_path / "a", teachers, prompts) == 0
    answers = rows(tmp_path / "a/completions.jsonl")
    assert {row["teacher"] for row in answers} == {
        *map(aya_expanse_stage._name, branches.folders[:2]),
        "further",
    }
    for cluster, languages in CLUSTERS.items():
        for name in ("sft", "pairs"):
            own = rows(tmp_path / f"a/{name}_{cluster}.jsonl")
            assert {row["language"] for row in own} <= {*languages, "en"}
        assert all(row["chosen_reward"] > row["rejected_reward"] for row in own)
    assert run("rounds", path, tmp_path / "r", teachers) == 0
    page = json.loads((tmp_path / "r/rounds.json").read_text())
    made = page["indicators"]
    names = [aya_expanse_stage._name(folder) for folder in branches.folders[:2]]
    assert [row["round"] for row in made[:2]] == [f"{i}_{name}" for i, name in enumerate(names)]
    assert {row["language"] for row in made} == {"tr", "uk", "en"}
    assert all(row["reward"] == row["judge"] for row in made)
    assert {row["over_optimised"] for row in made} == {None}
    assert (
        "own reward, which cannot show over-optimisation" in (tmp_path / "r/rounds.md").read_text()
    )
    assert_rates_are_of_the_scores(page["win_rates"], tmp_path / "r", names)


def assert_rates_are_of_the_scores(win_rates, folder, names):
    """Compares the win rates with a count of the larger scores in the judge's journal."""
    first, second = (f"{i}_{name}" for i, name in enumerate(names))
    texts = {
        (row["teacher"], row["id"]): row["text"]
        for file in (folder / "completions.jsonl", folder / "opponent/completions.jsonl")
        for row in rows(file)
    }
    # Equal answers to a prompt have one score, in the row of one of them.
    scores = {
        (row["id"], texts[row["of"], row["id"]]): row["value"]
        for row in rows(folder / "judgements.jsonl")
    }
    pairs = [(second, first), (first, "opponent"), (second, "opponent")]
    assert [(one["a"], one["b"]) for one in win_rates] == pairs
    language_of = {row["id"]: row["language"] for row in rows(folder / "completions.jsonl")}
    for (a, b), one in zip(pairs, win_rates, strict=True):
        assert one["unanswered"] == 0
        for language, summary in one["languages"].items():
            won = []
            for id in (id for id, its in language_of.items() if its == language):
                own, other = texts[a, id], texts[b, id]
                if own == other:
                    won.append(0.5)
                else:
                    won.append(float(scores[id, own] > scores[id, other]))
            assert len(won) == 2
            assert summary["rate"]["value"] == pytest.approx(np.mean(won))
            assert summary["rate"]["low"] < summary["rate"]["value"] < summary["rate"]["high"] or (
                np.ptp(won) == 0
            )


PROMPT = {"columns": {}, "where": "x"}


def prompts_of(*languages):
    return [
        prompts.Prompt(id=str(i), language=language, prompt=f"p{i}", **PROMPT)
        for i, language in enumerate(languages)
    ]


def answers_of(**texts):
    """Answers of models to prompts by letters, of which a space is none."""
    (count,) = {len(text) for text in texts.values()}
    return [
        {
            name: {"key": f"{name}{i}", "text": text[i], "ended": "stop"}
            for name, text in texts.items()
            if text[i] != " "
        }
        for i in range(count)
    ]


class FirstOrZ:
    """Writes that an answer z is preferred and, without one, the answer that is shown first."""

    name, identity = "first or z", {}

    def write(self, asked, *, temperature, seed):
        for i, text in enumerate(asked):
            answers = text.split("<answer_b>")
            assert "in Turkish" in text
            preferred = "B" if "\nz\n" in answers[1] and "\nz\n" not in answers[0] else "A"
            yield i, f"Comparison: x\nPreferred: Answer ({preferred})"


def test_a_judge_of_win_rates_sees_both_orders_and_what_is_unanswered_counts_for_neither(tmp_path):
    rewards = arbitrage_rewards.Rewards(RewardFlags(reward="judge:logprob:/x"), tmp_path)
    vars(rewards)["_judge"] = pairwise.PairwiseJudge(FirstOrZ(), wording=pairwise.Template())
    asked = prompts_of(*["tr"] * 5)
    made = win_rates.between("r1", "r0", asked, answers_of(r1="zzbcz", r0="axyz "), rewards)
    assert made["unanswered"] == 1
    counts = made["languages"]["tr"]["counts"]
    # z wins in both orders and loses in both; of b and y the first is preferred, which is a tie.
    assert counts == {"win": 2, "loss": 1, "tie": 1, "identical": 0, "invalid": 0}
    assert made["languages"]["tr"]["consistency"]["value"] == 0.75
    with pytest.raises(DataError, match="no prompt that both 'r1' and 'r2' answer"):
        win_rates.between("r1", "r2", asked, answers_of(r1="zabcz", r2="     "), rewards)


def test_without_a_judge_the_larger_reward_wins(tmp_path):
    rewards = arbitrage_rewards.Rewards(RewardFlags(reward="exact_answer"), tmp_path)
    asked = [
        dataclasses.replace(prompt, columns={"answer": "x"})
        for prompt in prompts_of("tr", "tr", "tr", "uk")
    ]
    made = win_rates.between("r1", "r0", asked, answers_of(r1="xxbx", r0="axcb"), rewards)
    rates = {code: one["rate"]["value"] for code, one in made["languages"].items()}
    assert rates == {"tr": pytest.approx(2 / 3), "uk": 1} and made["worst"] == "tr"
    table = win_rates.markdown([made])
    assert "| r1 | r0 | uk | 100.0 (" in table and "| r1 | r0 | mean | 66.7 |" in table
    assert "| 3 of 3 |" in table


def test_an_opponent_in_a_file_answers_every_prompt_once(write, tmp_path):
    asked = prompts_of("tr", "uk")
    path = tmp_path / "opponent.jsonl"

    def stored(*answers):
        path.write_text("".join(json.dumps({"prompt": p, "text": t}) + "\n" for p, t in answers))
        return win_rates.stored(str(path), asked)

    made = stored(("p1", "b"), ([{"role": "user", "content": "p0"}], "a"), ("other", "c"))
    assert [row["opponent"]["text"] for row in made] == ["a", "b"]
    with pytest.raises(DataError, match="line 3: .* has two answers to this prompt"):
        stored(("p1", "b"), ("p0", "a"), ("p1", "c"))
    with pytest.raises(DataError, match="has no answer to x and 0 more prompts"):
        stored(("p1", "b"))
    # The first stage reads it, before models are trained.
    with pytest.raises(DataError, match="has no answer to .*, line 1 and 5 more prompts"):
        flags = _flags(
            stage="prompts",
            recipe=write(opponent=str(path)),
            to=str(tmp_path / "p"),
            flags=(),
        )
        aya_expanse_stage._run(flags)
    with pytest.raises(recipes.RecipeError, match="'opponent' /no/run does not exist"):
        recipes.read(write(opponent="/no/run"))


def test_over_optimisation_is_a_rising_reward_and_a_falling_judge():
    def table(*rewards, **more):
        return [
            {
                "language": "tr",
                "teacher": f"r{i}",
                "reward": r,
                "asked": 4,
                "new_tokens": 3.0,
                **more,
            }
            for i, r in enumerate(rewards)
        ]

    names = ["r0", "r1", "r2"]
    made = aya_expanse_stage.indicators(names, table(0.1, 0.5, 0.6, cut=1), table(0.4, 0.5, 0.3))
    assert [row["over_optimised"] for row in made] == [None, False, True]
    assert {row["cut"] for row in made} == {0.25} and {row["wrong_language"] for row in made} == {0}
    assert "| tr | r2 | 0.6 | 0.3 | 3 | 0 | 0.25 | yes |" in aya_expanse_stage.markdown(made)
    unknown = aya_expanse_stage.indicators(names, table(0.1, None, 0.6), table(0.4, 0.5, 0.3))
    assert [row["over_optimised"] for row in unknown] == [None, None, None]
    with pytest.raises(DataError, match="no answer of 'r3' in 'tr'"):
        aya_expanse_stage.indicators([*names, "r3"], table(1, 2, 3), table(1, 2, 3))


def test_a_merge_has_the_weights_of_a_search(write, tmp_path, monkeypatch):
    searches, merges = [], []

    def searched(flags):
        searches.append(flags)
        pathlib.Path(flags.out).mkdir(parents=True)
        return ["without 0_a +0.1"]

    monkeypatch.setattr(search, "run", searched)
    monkeypatch.setattr(merge, "main", lambda argv: merges.append(argv) or 0)
    to, runs = tmp_path / "m/seed0", ("runs", ["/runs/a/seed0", "/runs/b/seed0"])
    assert run("merge", write(dev="/dev", trials=7), to, runs) == 0
    (flags,) = searches
    held_out = [f"{code}=/dev/{code}.jsonl" for code in ("uk", "en", "tr")]
    assert flags.held_out == held_out and flags.budget == 7 and not flags.measure
    assert flags.models == ["0_a=/runs/a/seed0", "1_b=/runs/b/seed0"]
    assert merges == [[f"--config={to}.search/merge.yml", f"--out={to}"]]
    assert "without 0_a" in pathlib.Path(f"{to}.search", "table.txt").read_text()
    to = tmp_path / "n/seed0"
    measured = {"measure": "score {run} {json}", "scores": ["tr=of/tr"]}
    assert run("merge", write(**measured), to, runs) == 0
    assert not searches[1].held_out and searches[1].scores == ["tr=of/tr"]
    assert searches[1].measure == ("score {run} {json}",)
    for changes in ({"dev": "/dev", **measured}, {"measure": "x"}, {"scores": ["x=y"]}):
        with pytest.raises(recipes.RecipeError, match="give either 'dev', or 'measure'"):
            recipes.read(write(**changes))
