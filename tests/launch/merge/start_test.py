"""A run that starts from a merge in memory has, bit for bit, the start of a run from the output of `espalier merge`."""

import json
import shutil

import jax
import numpy as np
import pytest

from espalier.launch.merge import run, start
from espalier.launch.merge.settings import MergeError
from espalier.model.low_rank.decompose import Decompose
from espalier.model.transforms.merge_methods import METHODS
from espalier.trainers.checkpoints import restore, state_tree, step_dir
from espalier.trainers.checkpoints.array_files import StoredArray
from espalier.trainers.checkpoints.initial import InitialCheckpoint, transformed
from espalier.trainers.checkpoints.restore_params import restore_params
from espalier.trainers.train_state import TrainState
from tests.launch.merge import folders

# Values of parameters that are not their defaults; lists are spread over the layers.
VALUES = {"weight": [0.9, 0.3], "density": 0.6, "t": [0.2, 0.7], "gamma": 0.1, "epsilon": 0.05}
VALUES |= {"select_topk": 0.5, "scale": 0.5, "lambda": 0.8}


def configuration(method, runs, **settings):
    """A merge of runs by this method; the first of them is the base if the method needs one."""
    parameters = METHODS[method].parameters
    values = [(name, VALUES[name], parameters[name].each) for name in VALUES.keys() & parameters]
    own, shared = ({k: v for k, v, each in values if each is of} for of in (True, False))
    base = {"base_model": runs[0]} if METHODS[method].base == "needed" else {}
    entries = [{"model": path, "parameters": own} for path in runs[1:][: METHODS[method].most]]
    return {"merge_method": method, **base, "models": entries, "parameters": shared, **settings}


def on_disk(folder, merge):
    """The output of `espalier merge`."""
    (folder / "merge.yml").write_text(json.dumps(merge))
    run.merge_all(str(folder / "merge.yml"), str(folder / "out"))
    return str(folder / "out")


def wide(params):
    """The parameters of a model that has float32 where a merge has another dtype."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), params)


def same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("method", METHODS)
def test_the_start_is_that_of_the_output(method, branches, tmp_path):
    merge = configuration(method, branches.folders[:3], out_dtype="bfloat16")
    out, computed = on_disk(tmp_path, merge), start.Merge(merge)()
    abstract = wide(branches.params[0])
    ours = restore_params("of no effect", abstract, computed=computed)
    same(ours, restore_params(out, abstract))
    table = ours["token_embed"]["embedding"]
    assert not any(np.array_equal(table, x["token_embed"]["embedding"]) for x in branches.params)
    assert dict(computed.meta) == step_dir.read_meta(out)
    assert str(computed.steps[0]).startswith(merge.get("base_model") or branches.folders[1])
    layers = jax.tree.leaves(abstract["layers"])
    tensors = computed.table()[len(merge["models"]) + ("base_model" in merge) + 1 :]
    assert len(tensors) == len(jax.tree.leaves(abstract)) + len(layers)  # two in each
    assert all(method in line.split() for line in tensors)


def test_layers_are_read_in_the_layout_of_the_run(branches, tmp_path):
    merge = configuration("ties", branches.folders[:3])
    abstract = {**wide(branches.params[0])}
    stacked = abstract.pop("layers")["block_0"]
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacked)
    abstract["layers"] = {"block_0": one, "block_1": one}
    ours = restore_params("of no effect", abstract, computed=start.Merge(merge)())
    same(ours, restore_params(on_disk(tmp_path, merge), abstract))


def test_a_merge_is_factorised_as_its_output_is(branches, tmp_path):
    merge = configuration("slerp", branches.folders[:2])
    out = on_disk(tmp_path, merge)
    params = state_tree.flatten(wide(branches.params[0]))
    kernel = params.pop("layers/block_0/mlp/up/kernel")
    layers, rows, columns = kernel.shape
    for name, shape in (("u", (layers, rows, 3)), ("v", (layers, 3, columns))):
        params[f"layers/block_0/mlp/up/{name}"] = jax.ShapeDtypeStruct(shape, np.float32)
    state = TrainState(step=0, params=state_tree.nest(params), opt_state=(), variables={})
    states = []
    for path, computed in ((out, None), (branches.folders[0], start.Merge(merge)())):
        step = step_dir.resolve(path)
        more = (
            step,
            step_dir.read_manifest(step),
            state,
            Decompose(),
            InitialCheckpoint(path=path),
        )
        states.append(transformed(*more, computed).params)
    same(*states)


@pytest.fixture(scope="module")
def trained(train, branches, tmp_path_factory):
    """Runs of two updates: from the output of a merge, and from the merge itself, stopped for good after one of them."""
    folder = tmp_path_factory.mktemp("trained")
    lines = [json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 4}) for i in range(40)]
    (folder / "x.jsonl").write_text("\n".join(lines) + "\n")
    merge = configuration("dare_ties", branches.folders[:3])
    common = (
        f"FILES={str(folder / 'x.jsonl')!r}",
        "VALIDATION_FRACTION=0.2",
        "VOCABULARY=@vocabularies.byte()",
        "MIXTURE_OR_TASK_NAME='files'",
        "TASK_FEATURE_LENGTHS={'targets': 32}",
        "BATCH_SIZE=8",
        "TRAIN_STEPS=2",
        "CHECKPOINT_PERIOD=1",
        "EVAL_PERIOD=2",
        *(
            f"config.TransformerConfig.{name}={value}"
            for name, value in {
                "num_layers": 2,
                "embed_dim": 16,
                "num_heads": 2,
                "num_kv_heads": 1,
                "mlp_dim": 16,
                "vocab_size": 264,
            }.items()
        ),
    )

    def command(name, *bindings, files=()):
        names = ("models/tiny", "data/files", "runs/pretrain", *files)
        given = (f"MODEL_DIR={str(folder / name)!r}", *common, *bindings)
        result = train(
            *(f"--gin_file=t5x_configs/{file}.gin" for file in names),
            *(f"--gin.{binding}" for binding in given),
        )
        assert result.status == 0, result.err

    command("from_output", f"INITIAL_CHECKPOINT_PATH={on_disk(folder, merge)!r}")
    of_merge = {"files": ("methods/averaging/merge",)}
    command("from_merge", f"MERGE={merge!r}", **of_merge)
    shutil.copytree(folder / "from_merge", folder / "resumed")
    shutil.rmtree(folder / "resumed" / "checkpoints" / "2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "opened", None)  # the models of the merge are not read again
        command("resumed", f"MERGE={merge!r}", **of_merge)
    run_and_other = [str(folder / "from_output"), branches.folders[3]]
    of_branch = configuration("linear", [None, *run_and_other])
    more = (f"INITIAL_CHECKPOINT_PATH={run_and_other[0]!r}", "INITIAL_SCOPE='state'")
    rate = ("LEARNING_RATE=0.0", "TRAIN_STEPS=3")
    command("branch", f"MERGE={of_branch!r}", *more, *rate, **of_merge)
    return folder, merge


def arrays(path):
    step = step_dir.resolve(path)
    entries = step_dir.read_manifest(step).arrays
    names = [name for name, x in entries.items() if x.shape and not name.startswith("variables/")]
    return {name: StoredArray(step, name).read() for name in names}


def test_a_run_from_a_merge_is_that_from_its_output_and_resumes(trained):
    folder, merge = trained
    expected = arrays(folder / "from_output")
    for name in ("from_merge", "resumed"):
        ours = arrays(folder / name)
        assert ours.keys() == expected.keys()
        for path, values in expected.items():
            np.testing.assert_array_equal(ours[path], values, err_msg=f"{name}: {path}")
        meta = step_dir.read_meta(folder / name)
        assert meta["made_of"] == ["seed, step 1", "code, step 1", "law, step 1"]
        assert meta["merged"]["configuration"] == merge
        assert meta["initial"]["path"] == f"{merge['base_model']}/checkpoints/1"
    assert "merged" not in step_dir.read_meta(folder / "from_output")


def test_the_state_of_a_branch_goes_on_with_the_parameters_of_the_merge(trained, branches):
    folder, _ = trained
    before, after = arrays(folder / "from_output"), arrays(folder / "branch")
    runs = [None, str(folder / "from_output"), branches.folders[3]]
    merged = start.Merge(configuration("linear", runs))()
    assert step_dir.resolve(folder / "branch").name == "3"  # the next update, at the rate 0
    second = [name for name in after if "/nu/" in name]
    for name, values in after.items():
        if name.startswith("params/"):
            expected = merged.read(name.removeprefix("params/"))
            np.testing.assert_array_equal(values, expected, err_msg=name)
            assert not np.array_equal(values, before[name])
    assert second
    for (
        name
    ) in second:  # moments of squares decay by 0.95 at most, and those of new ones begin at 0
        assert (after[name] >= 0.9 * before[name]).all() and before[name].max() > 0
    meta = step_dir.read_meta(folder / "branch")
    assert meta["initial"]["scope"] == "state" and meta["made_of"] == [
        "from_output, step 2",
        "math, step 1",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scope": "phase", "transform": Decompose()}, "INITIAL_TRANSFORM"),
        ({"use_ema": True}, "use_ema"),
        ({"base_apart": True}, "BASE_APART"),
        ({"path": None}, "INITIAL_CHECKPOINT_PATH = None"),
    ],
)
def test_what_a_merge_does_not_have_is_refused(settings, message):
    merge = start.Merge("merge.yml")
    with pytest.raises(ValueError, match=message):
        InitialCheckpoint(**{"path": "/x", "computed": merge, **settings}).check()


def test_what_is_no_start_is_refused(branches, tmp_path):
    merge = configuration("linear", branches.folders[:3])
    with pytest.raises(MergeError, match="MERGE_SEED = 1 has no effect"):
        start.Merge(merge, seed=1)()
    with pytest.raises(MergeError, match="no method 'mean'"):
        start.Merge({**merge, "merge_method": "mean"})
    folders.pair(tmp_path)
    hf = configuration("linear", [None, f"{tmp_path}/a", f"{tmp_path}/b"])
    with pytest.raises(MergeError, match="is a Hugging Face folder, where runs are needed"):
        start.Merge(hf)()
    (tmp_path / "two.yml").write_text(
        f"{json.dumps({'name': 'x', **merge})}\n---\n{json.dumps(merge)}"
    )
    with pytest.raises(MergeError, match="has 2 documents"):
        start.first_model(merge=str(tmp_path / "two.yml"))
    # Another run's vocabulary and facts would be those of another model.
    other = InitialCheckpoint(path=branches.folders[3], computed=start.Merge(merge))
    with pytest.raises(ValueError, match="INITIAL_CHECKPOINT_PATH = .* is none of the checkpoints"):
        restore._computed(other)
