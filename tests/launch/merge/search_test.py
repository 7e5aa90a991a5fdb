"""The weights of any method with weights are searched, by losses or by any command's numbers."""

import json
import re
import shutil

import numpy as np
import pytest
import yaml

from espalier.launch.merge import search, trials
from espalier.launch.merge.candidates import Candidates, Measure
from espalier.launch.merge.settings import MergeError
from espalier.launch.merge.trials import Trial
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.checkpoints.array_files import StoredArray

EMBEDDING = "token_embed/embedding"


def stored(path):
    return StoredArray(step_dir.resolve(path), f"params/{EMBEDDING}").read()


def ties(base):
    return {"merge_method": "ties", "base_model": base, "parameters": {"density": 0.5}}


def test_a_candidate_is_the_merge_of_its_configuration(branches, tmp_path):
    base, *paths = branches.folders
    found = Candidates("merge.yml", ties(base), [*paths[:2], paths[0]])
    config = found.configuration([0.2, 0.5, 0.3])
    weights = {x["model"]: x["parameters"]["weight"] for x in config["models"]}
    assert weights == {paths[0]: 0.5, paths[1]: 0.5}  # of the model that is given twice, both
    merged = found.merged([0.2, 0.5, 0.3]).read(EMBEDDING)
    np.testing.assert_array_equal(merged, stored(found.on_disk([0.2, 0.5, 0.3], str(tmp_path))))
    # A model alone is itself, though TIES would drop half of its delta.
    assert found.on_disk([0.0, 1.0, 0.0], str(tmp_path)) == paths[1]
    np.testing.assert_array_equal(found.merged([0.0, 1.0, 0.0]).read(EMBEDDING), stored(paths[1]))


def test_slerp_is_searched_from_one_model_to_the_other(branches):
    one, other = branches.folders[:2]
    found = Candidates("merge.yml", {"merge_method": "slerp"}, [one, other])
    config = found.configuration([3, 1])
    assert (config["base_model"], config["parameters"]) == (one, {"t": 0.25})
    a, b = (stored(path).astype(np.float64) for path in (one, other))
    angle = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    arc = (np.sin(0.75 * angle) * a + np.sin(0.25 * angle) * b) / np.sin(angle)
    np.testing.assert_allclose(found.merged([3, 1]).read(EMBEDDING), arc, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"merge_method": "model_stock"},
            "model_stock has no weights to search; these have: linear",
        ),
        ({"merge_method": "ties", "models": []}, "models: a search takes merge_method"),
        ({"merge_method": "ties", "parameters": {"weight": 1}}, "parameters.weight is what"),
        ({"merge_method": "slerp", "base_model": "/a"}, "base_model: slerp is searched between"),
        ({"merge_method": "ties", "base_model": "/a"}, "base_model /a is among --models"),
        ({"merge_method": "tyes"}, "no method 'tyes'"),
    ],
)
def test_what_cannot_be_searched_is_refused(content, message):
    with pytest.raises(MergeError, match=message):
        Candidates("merge.yml", content, ["/a", "/b"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "Give either --held_out"),
        ({"held_out": ["a=b"], "measure": ["x"]}, "Give either --held_out"),
        ({"measure": ["x"]}, "--measure and --scores go together"),
        ({"held_out": ["a=b"], "lower_is_better": True}, "--lower_is_better is of --measure"),
        ({"held_out": ["a=b"], "merge": "m.yml", "params": "raw"}, "--params=raw"),
        ({"measure": ["x"], "scores": ["a=b"], "batch_size": 2}, "--batch_size is of --held_out"),
        ({"measure": ["x"], "scores": ["a=b"], "frontier": True}, "--frontier compares two"),
        (
            {"measure": ["x"], "scores": ["a=-b"], "lower_is_better": True},
            "--lower_is_better is of all --scores",
        ),
    ],
)
def test_flags_without_effect_are_refused(given, message, tmp_path):
    with pytest.raises(MergeError, match=message):
        search.run(search.SearchFlags(models=["a=/a", "b=/b"], out=str(tmp_path), **given))


def test_weights_are_absolute_where_their_sum_changes_the_merge(branches):
    base, *paths = branches.folders[:3]
    based = {"base_model": base}
    for content, absolute in (
        ({"merge_method": "task_arithmetic", **based}, True),
        ({**ties(base), "parameters": {"normalize": False}}, True),
        ({"merge_method": "dare_ties", **based, "parameters": {"normalize": True}}, False),
        # Of some tensors only.
        ({**ties(base), "parameters": {"normalize": [{"filter": "mlp", "value": False}]}}, True),
        ({"merge_method": "linear", "parameters": {"normalize": False}}, True),
        ({"merge_method": "multislerp", "parameters": {"normalize_weights": False}}, True),
        ({"merge_method": "multislerp"}, False),
        ({"merge_method": "nuslerp"}, False),
        (ties(base), False),
    ):
        assert Candidates("merge.yml", content, paths).absolute is absolute, content


def test_a_part_of_a_model_is_no_model_alone(branches, tmp_path):
    base, one = branches.folders[:2]
    content = {"merge_method": "task_arithmetic", "base_model": base}
    candidates = Candidates("merge.yml", content, [one, branches.folders[2]])
    assert candidates.on_disk([1.0, 0.0], str(tmp_path)) == one
    half = candidates.merged([0.5, 0.0]).read(EMBEDDING)
    np.testing.assert_allclose(half, (stored(base) + stored(one)) / 2, atol=1e-6)
    np.testing.assert_array_equal(half, stored(candidates.on_disk([0.5, 0.0], str(tmp_path))))


@pytest.mark.parametrize("merge", [None, {"merge_method": "linear"}])
def test_a_copy_of_a_model_is_refused_before_the_search(branches, tmp_path, merge):
    one, other = branches.folders[1:3]
    shutil.copytree(one, tmp_path / "copy")
    (tmp_path / "linear.yml").write_text(yaml.safe_dump(merge))
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    models = [f"a={one}", f"b={other}", f"c={tmp_path}/copy"]
    flags = search.SearchFlags(
        models=models,
        held_out=[f"x={tmp_path}/rows.jsonl"],
        out=str(tmp_path / "out"),
        merge=str(tmp_path / "linear.yml") if merge else None,
    )
    message = f"lists a model twice: {tmp_path}/copy has the weights of {re.escape(one)}"
    with pytest.raises(MergeError, match=message):
        search.run(flags)
    assert not (tmp_path / "out").exists()


MEASURE = """
import json, os, sys
run, file = sys.argv[1:]
record = os.path.join(run, "merge.json")
weights = [float(run == other) for other in OTHERS]
if os.path.exists(record):
    named = json.load(open(record))["configuration"]["models"]
    named = {x["model"]: x["parameters"]["weight"] for x in named}
    weights = [named.get(other, 0.0) for other in OTHERS]
scores = {"low": -((weights[0] - 0.4) ** 2), "high": -((weights[0] - 0.6) ** 2)}
json.dump({"of": scores, "seconds": 1.0}, open(file, "w"))
"""


def test_weights_are_searched_by_the_numbers_of_a_command(branches, tmp_path):
    base, *paths = branches.folders[:3]
    (tmp_path / "measure.py").write_text(MEASURE.replace("OTHERS", repr(paths)))
    (tmp_path / "ties.yml").write_text(yaml.safe_dump(ties(base)))
    flags = search.SearchFlags(
        models=[f"{name}={path}" for name, path in zip("ab", paths, strict=True)],
        out=str(tmp_path / "out"),
        merge=str(tmp_path / "ties.yml"),
        measure=[f"{{python}} {tmp_path}/measure.py {{run}} {{json}}"],
        scores=["low=of/low", "high=of/high"],
        budget=1,
    )
    lines = search.run(flags)
    found = json.loads((tmp_path / "out" / "search.json").read_text())
    rows = (tmp_path / "out" / "trials.jsonl").read_text().splitlines()[1:]
    scores = {tuple(x["weights"]): x["losses"] for x in map(json.loads, rows)}
    assert len(scores) == 4  # the models too, and one between them and equal weights
    for (first, _), of in scores.items():
        expected = {"low": -((first - 0.4) ** 2), "high": -((first - 0.6) ** 2)}
        assert of == pytest.approx(expected, abs=1e-6)
    # Equal weights are 0.15 above the best single model in both domains.
    assert found["best"]["weights"] == [0.5, 0.5] and "worst gap" in lines[0]
    assert lines[1].split() == ["merged", "-0.0100", "-0.0100", "-0.1500", "-0.1500"]
    (row,) = (line.split() for line in lines if line.startswith("without a"))
    assert row == ["without", "a", "0.500", "-0.1500", "-0.3500", "-0.2500", "-0.3500"]
    written = yaml.safe_load((tmp_path / "out" / "merge.yml").read_text())
    assert written == Candidates("", ties(base), paths).configuration([0.5, 0.5])
    # The same command repeats no trial; another command is another search.
    assert "0 of them new" in search.run(flags)[-1]
    with pytest.raises(MergeError, match="other models, texts or settings"):
        search.run(search.SearchFlags(**{**vars(flags), "lower_is_better": True}))


def test_a_search_of_task_vectors_reaches_the_sum_of_all(branches, tmp_path):
    base, *paths = branches.folders[:3]
    scores = re.compile("^scores = .*$", re.M)
    sum_of_all = 'scores = {"sum": -sum((w - 1) ** 2 for w in weights)}'
    measure = scores.sub(sum_of_all, MEASURE).replace("OTHERS", repr(paths))
    (tmp_path / "measure.py").write_text(measure)
    content = {"merge_method": "task_arithmetic", "base_model": base}
    (tmp_path / "task.yml").write_text(yaml.safe_dump(content))
    flags = search.SearchFlags(
        models=[f"{name}={path}" for name, path in zip("ab", paths, strict=True)],
        out=str(tmp_path / "out"),
        merge=str(tmp_path / "task.yml"),
        measure=[f"{{python}} {tmp_path}/measure.py {{run}} {{json}}"],
        scores=["sum=of/sum"],
        budget=1,
    )
    search.run(flags)
    written = yaml.safe_load((tmp_path / "out" / "merge.yml").read_text())
    assert [x["parameters"]["weight"] for x in written["models"]] == [1.0, 1.0]
    trials_file = tmp_path / "out" / "trials.jsonl"
    first, *rest = trials_file.read_text().splitlines()
    assert {(1.0, 1.0), (0.7, 0.7)} <= {tuple(json.loads(x)["weights"]) for x in rest}
    # Trials of weights that sum to 1, which an earlier version stored, are of other merges.
    facts = json.loads(first)
    assert facts.pop("weights") == "absolute"
    trials_file.write_text("\n".join([json.dumps(facts), *rest, ""]))
    with pytest.raises(MergeError, match="trials of other models, texts or settings"):
        search.run(flags)


HELP_AND_HARM = """
import json, os, sys
run, file, key = sys.argv[1:]
record = os.path.join(run, "merge.json")
weight = float(run == SAFE)
if os.path.exists(record):
    named = json.load(open(record))["configuration"]["models"]
    weight = sum(x["parameters"]["weight"] for x in named if x["model"] == SAFE)
numbers = {"help": 1 - weight ** 2, "harm": {"rate": max(0.0, 0.6 - weight)}}
json.dump({key: numbers[key]}, open(file, "w"))
"""


def test_the_frontier_of_help_against_harm_is_that_of_its_definition(branches, tmp_path):
    base, *paths = branches.folders[:3]
    (tmp_path / "measure.py").write_text(HELP_AND_HARM.replace("SAFE", repr(paths[1])))
    words = f"{{python}} {tmp_path}/measure.py {{run}} {{json}}"
    flags = search.SearchFlags(
        models=[f"helpful={paths[0]}", f"safe={paths[1]}"],
        out=str(tmp_path / "out"),
        measure=[f"{words} help", f"{words} harm"],
        scores=["help=help", "harm=-harm/rate"],
        frontier=True,
        method="random",
        budget=3,
    )
    lines = search.run(flags)
    rows = (tmp_path / "out" / "trials.jsonl").read_text().splitlines()[1:]
    tried = {tuple(x["weights"]): x["losses"] for x in map(json.loads, rows)}
    for (_, safe), losses in tried.items():
        expected = {"help": 1 - safe**2, "harm": -max(0.0, 0.6 - safe)}
        assert losses == pytest.approx(expected, abs=1e-5)

    def dominated(one):
        return any(
            all(other[x] >= one[x] for x in one) and any(other[x] > one[x] for x in one)
            for other in tried.values()
        )

    result = json.loads((tmp_path / "out" / "search.json").read_text())
    found = {tuple(x["weights"]): x["losses"] for x in result["frontier"]}
    assert found == {weights: x for weights, x in tried.items() if not dominated(x)}
    # Harm is 0 from a weight of 0.6 on, so the safe model alone only loses help where another trial is there too.
    assert (0.0, 1.0) in tried and (1.0, 0.0) in found and len(found) >= 3
    assert ((0.0, 1.0) in found) == (not any(0.6 <= w[1] < 1 for w in tried))
    merges = [x["merge"] for x in result["frontier"]]
    assert merges[0] == {"merge_method": "passthrough", "models": [{"model": paths[0]}]}
    table = lines[lines.index("") + 1 :]
    assert table[0].split() == ["frontier", "helpful", "safe", "help", "harm"]
    assert table[1].split() == ["1.000", "0.000", "1.0000", "0.6000"]  # harm as it was measured
    assert (tmp_path / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "0 of them new" in search.run(flags)[-1]
    both = Measure([f"{words} help"] * 2, {"help": "help"})
    with pytest.raises(MergeError, match="several files of --measure have it"):
        both(paths[0], str(tmp_path))


@pytest.mark.parametrize("higher", [False, True])
def test_the_frontier_of_any_trials_is_that_of_its_definition(higher):
    rng = np.random.default_rng(0)
    for _ in range(200):
        points = rng.integers(0, 6, (rng.integers(1, 12), 2)).tolist()  # many are equal
        tried = [
            Trial((float(i),), {"x": x, "y": y}, {}, higher) for i, (x, y) in enumerate(points)
        ]
        sign = 1 if higher else -1
        wanted = {
            i
            for i, (x, y) in enumerate(points)
            if not any(
                sign * a >= sign * x and sign * b >= sign * y and (a, b) != (x, y)
                for a, b in points
            )
        }
        found = trials.frontier(tried, "x", "y")
        assert {int(trial.weights[0]) for trial in found} == wanted and len(found) == len(wanted)
        firsts = [sign * trial.losses["x"] for trial in found]
        assert firsts == sorted(firsts, reverse=True)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit(3)", "--measure ended with status 3"),
        ("", "--measure wrote no JSON"),
        ("import sys; open(sys.argv[2], 'w').write('[')", "--measure wrote no JSON"),
        (
            "import sys; open(sys.argv[2], 'w').write('{\"c\": {\"d\": 1}}')",
            "--scores x=a/b: the file of --measure has the numbers c/d",
        ),
    ],
)
def test_a_command_that_gives_no_number_is_an_error(code, message, tmp_path):
    (tmp_path / "measure.py").write_text(code)
    measure = Measure([f"{{python}} {tmp_path}/measure.py {{run}} {{json}}"], {"x": "a/b"})
    with pytest.raises(MergeError, match=message):
        measure("/run", str(tmp_path))


def test_a_command_without_a_place_for_the_run_or_the_file_is_an_error():
    for command, place in (("score {run}", "{json}"), ("score {json}", "{run}")):
        with pytest.raises(MergeError, match=f"has no {place}"):
            Measure([command], {})


def test_the_best_scores_are_the_highest(tmp_path):
    def trial(*scores):
        return Trial((1.0,), dict(zip("xy", scores, strict=True)), {"x": 0.1, "y": 0.0}, True)

    one, other, between = trial(0.9, -3.0), trial(0.2, -1.0), trial(0.8, -1.1)
    single = trials.best_single([one, other])
    assert single == {"x": 0.9, "y": -1.0}
    assert trials.choose([one, other, between], delta=0, single=single) is between
    assert between.ratios(single) == pytest.approx({"x": 0.1, "y": 0.1})
