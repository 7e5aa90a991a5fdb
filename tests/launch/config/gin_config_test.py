"""Problems are found all at once and before anything runs; what loads does what plain Python does."""

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.launch.config import build, gin_config
from espalier.launch.config.gin_config import ConfigError

ENTRY = "toy_run:train"
HEAD = "from __gin__ import dynamic_registration\nimport toy_net\nimport toy_run\n"


def errors(*args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        gin_config.load(*args, **kwargs)
    return str(caught.value)


def test_loads_calls_and_reports_itself(gin_file, toy_gin):
    config = gin_config.load([gin_file(toy_gin)], ['MODEL_DIR="/x"', "TRAIN_STEPS=3"], entry=ENTRY)
    got = config.entry()
    assert got["steps"] == 3
    assert got["model_dir"] == "/x"
    assert got["optimizer"] == ("adam", 0.5, None)
    assert config.macros["TRAIN_STEPS"] == 3
    assert config.arguments()["steps"] == 3
    used = config.operative_text().replace("%TRAIN_STEPS", "3")
    assert "toy_run.train.steps = 3" in used and "toy_run.train.names = None" in used


def test_saved_text_loads_to_the_same_configuration(gin_file, toy_gin):
    text = toy_gin + "toy_net.Block.dense = @toy_net.Factored\na/toy_net.Factored.rank = 3\n"
    text += "toy_net.Net.block = @a/toy_net.Block\n"
    first = gin_config.load([gin_file(text)], ["MODEL_DIR=/x"], entry=ENTRY)
    model = first.entry()["model"]
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 4)))
    operative = first.operative_text()
    for saved in (first.text, operative):
        again = gin_config.load([gin_file(saved, "saved.gin")], entry=ENTRY)
        model = again.entry()["model"]
        assert jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 4))) == shapes
        assert again.warnings == ()
    again = gin_config.load([gin_file(first.text, "saved.gin")], entry=ENTRY)
    assert again.text == first.text


def test_class_factories_work_inside_scan_and_remat(gin_file, toy_gin):
    import toy_net

    text = toy_gin + "toy_net.Block.dense = @toy_net.Factored\ntoy_net.Factored.rank = 3\n"
    config = gin_config.load([gin_file(text)], ["MODEL_DIR=/x"], entry=ENTRY)
    by_gin = config.entry()["model"]

    def factored(**kwargs):
        return toy_net.Factored(rank=3, **kwargs)

    class ScannedByHand(toy_net.Block):
        dense: object = factored

    by_hand = toy_net.Net(block=ScannedByHand)
    x = jnp.linspace(-1, 1, 8).reshape(2, 4)
    params = by_gin.init(jax.random.key(1), x)
    assert params["params"]["layers"]["inner"]["down"]["kernel"].shape == (3, 4, 3)

    def loss(net, params):
        return (net.apply(params, x) ** 2).sum()

    value, grads = jax.value_and_grad(lambda p: loss(by_gin, p))(params)
    value_hand, grads_hand = jax.value_and_grad(lambda p: loss(by_hand, p))(params)
    np.testing.assert_array_equal(value, value_hand)
    jax.tree.map(np.testing.assert_array_equal, grads, grads_hand)


def test_everything_wrong_is_reported_at_once_with_its_place(gin_file):
    path = gin_file(
        HEAD
        + """
        from espalier.model import transformr
        TRAIN_STEPS = 5
        UNUSED = 1
        MODEL_DIR = %gin.REQUIRED
        toy_run.train.model = @toy_net.Nett()
        toy_run.train.stepz = %TRAIN_STEP
        toy_run.train.model_dir = %MODEL_DIR
        toy_run.train.optimizer = @toy_net.optimizer()
        toy_net.optimizer.kind = 'adan'
        toy_run.train.steps = 'many'
        toy_nets.Block.dense = 3
        broken = = 1
        evl/toy_net.Net.layers = 2
        """.replace("        ", "")
    )
    bindings = ["RATTE=3", "toy_net.Net.layer=1"]
    text = errors([path, "t5x_configs/models/tinny.gin"], bindings, entry=ENTRY)
    expected = [
        f"{path}:5: there is no module 'espalier.model.transformr'\n    from espalier.model import transformr\n"
        "  Nearest: transformer, transforms.",
        f"{path}:7: nothing reads the macro 'UNUSED'",
        f"{path}:8: 'MODEL_DIR' is required",
        f"{path}:9: 'toy_net' has no 'Nett'",
        "Nearest: Net",
        f"{path}:10: 'toy_run.train' has no parameter 'stepz'",
        "Nearest: steps",
        f"{path}:10: macro 'TRAIN_STEP' has no value",
        "Nearest: TRAIN_STEPS",
        f"{path}:13: 'toy_net.optimizer.kind' cannot be 'adan': choose from 'adam', 'lion'",
        f"{path}:14: 'toy_run.train.steps' takes int, not 'many' (str)",
        f"{path}:15: 'toy_nets' is not imported by this file",
        f"{path}:16: cannot be parsed",
        f"{path}:17: nothing is referenced in the scope 'evl'",
        "--gin_file: no file 't5x_configs/models/tinny.gin'",
        "Nearest: t5x_configs/models/tiny.gin",
        "--gin.RATTE=3: nothing reads the macro 'RATTE'",
        "--gin.toy_net.Net.layer=1: 'toy_net.Net' has no parameter 'layer'",
        "Nearest: layers",
        "'toy_net.optimizer' is called without rate",
    ]
    for part in expected:
        assert part in text
    assert text.startswith("16 problems")


def test_problems_inside_includes_name_the_included_file(gin_file, tmp_path):
    inner = gin_file(HEAD + "toy_run.train.modle = 3\n", "inner.gin")
    outer = gin_file(f"include '{inner}'\ninclude 'missing.gin'\n", "outer.gin")
    text = errors([outer], entry=None)
    assert f"{inner}:4: 'toy_run.train' has no parameter 'modle'" in text
    assert f"{outer}:2: no file 'missing.gin'" in text


def test_imports_do_not_leak_between_files(gin_file):
    inner = gin_file(HEAD + "toy_run.train.model = 1\n", "inner.gin")
    outer = gin_file(f"include '{inner}'\ntoy_run.train.steps = 2\n", "outer.gin")
    assert f"{outer}:2: 'toy_run' is not imported by this file" in errors([outer])


def test_include_cycle(gin_file, tmp_path):
    path = gin_file(f"include '{tmp_path / 'run.gin'}'\n")
    assert "includes itself" in errors([path])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A = [1, 2\nB = 3\n", ":1: is not finished where line 2 begins the next statement"),
        ("A = /tmp/x\n", ":1: cannot be parsed"),
        ("A = 'open\nB = = 2\n", ":1: cannot be parsed"),
        (
            "A = {\n 'x': 1,\n 'x': 2}\nB = [{1: {1: 2}, 2: 0}]\n",
            ":3: cannot be parsed: the key 'x' is repeated",
        ),
        ("A = {1: 2, True: 3}\n", "the key True is repeated"),
        ("import toy_net\n", "Begin the file with: from __gin__ import dynamic_registration"),
        ("from __gin__ import dynamic_registration\nfrom toy_net import Net\n", "imports modules"),
        ("from __gin__ import dynamic_registration\nimport no_such_package\n", "no module"),
        (HEAD + "toy_run.CALLS.x = 1\n", "is not a function or class"),
        (HEAD + "toy_run.train:\n  model = 1\n  stepz = 2\n", ":6: 'toy_run.train' has no"),
    ],
)
def test_one_problem(gin_file, text, message):
    found = errors([gin_file(text)])
    assert message in found


def test_a_long_statement_is_shortened_in_its_error(gin_file):
    text = errors([gin_file(f"{HEAD}A = {'[' * 5000}{']' * 5000}\n")])
    assert ":4: cannot be parsed" in text and "[[ ..." in text and len(text) < 3000


def test_required_arguments_of_the_entry_point(gin_file):
    text = errors([gin_file(HEAD + "toy_run.train.steps = 1\n")], entry=ENTRY)
    assert "'toy_run.train' is called without model" in text
    assert "toy_run.train.model = ..." in text


def test_binding_without_effect_is_refused_on_the_command_line_and_warned_of_in_files(
    gin_file, toy_gin, method
):
    swapped = gin_file(toy_gin + "toy_net.Block.dense = @toy_net.Factored\n")
    bindings = ["MODEL_DIR=/x", "toy_net.Dense.bias=True"]
    text = errors([swapped], bindings, entry=ENTRY)
    assert "--gin.toy_net.Dense.bias=True: 'toy_net.Dense.bias' has no effect" in text
    extra = gin_file(HEAD + "toy_net.Dense.bias = True\n", "extra.gin")
    config = gin_config.load([swapped, extra], bindings[:1], entry=ENTRY)
    assert "'toy_net.Dense.bias' has no effect" in str(config.warnings[0])
    record = gin_file(HEAD + "toy_net.Dense.bias = True\n", "config.gin")
    assert gin_config.load([swapped, record], bindings[:1], entry=ENTRY).warnings == ()
    text = HEAD + "toy_net.Dense.bias = True\ntoy_net.Net.layers = 1\n"
    config = gin_config.load([swapped, method(text)], bindings[:1], entry=ENTRY)
    assert config.warnings == ()


def test_no_warning_of_what_a_later_file_or_the_command_line_replaced(gin_file, toy_gin):
    first = gin_file(toy_gin + "toy_net.Dense.bias = True\n")
    later = gin_file(HEAD + "toy_net.Block.dense = @toy_net.Factored\n", "later.gin")
    assert gin_config.load([first, later], ["MODEL_DIR=/x"], entry=ENTRY).warnings == ()
    instead = ["MODEL_DIR=/x", "toy_net.Block.dense=@toy_net.Factored"]
    assert gin_config.load([first], instead, entry=ENTRY).warnings == ()
    again = gin_file(HEAD + "toy_net.Dense.bias = False\n", "again.gin")
    (warning,) = gin_config.load([first, later, again], ["MODEL_DIR=/x"], entry=ENTRY).warnings
    assert str(warning).startswith(f"{again}:4: 'toy_net.Dense.bias' has no effect")


def test_macro_read_only_by_an_unused_part_is_refused_on_the_command_line(gin_file, toy_gin):
    path = gin_file(toy_gin + "toy_run.train.optimizer = None\n")
    text = errors([path], ["MODEL_DIR=/x", "RATE=0.1"], entry=ENTRY)
    assert "'RATE' has no effect: only toy_net.optimizer.rate reads it" in text


def test_fragments_may_leave_macros_open(gin_file):
    path = gin_file(HEAD + "SIZE = 3\ntoy_run.train.steps = %ELSEWHERE\n")
    assert gin_config.check([path], fragment=True).problems == []
    assert len(gin_config.check([path]).problems) == 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/a/b", "/a/b"),
        ('"/a/b"', "/a/b"),
        ("'/a b'", "/a b"),
        ("runs/first-1", "runs/first-1"),
        ("../x", "../x"),
        ("gs://bucket/x", "gs://bucket/x"),
        ("None", None),
    ],
)
def test_paths_need_no_quotes(gin_file, toy_gin, value, expected):
    config = gin_config.load([gin_file(toy_gin)], [f"MODEL_DIR={value}"], entry=ENTRY)
    assert config.entry()["model_dir"] == expected


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("TRAIN_STEPS=l00", "'l00' is not a value in gin syntax (it was 10)"),
        ("MODEL_DIR=true", "Did you mean True?"),
        ("MODEL_DIR=yes", "Did you mean True?"),
        ("MODEL_DIR=off", "Did you mean False?"),
        ("MODEL_DIR=null", "Did you mean None?"),
        ("MODEL_DIR=nan", "'nan' is not a value in gin syntax. A string"),
        ("MODEL_DIR=a b", "needs quotes inside quotes"),
        ("MODEL_DIR=/x\nRATE=3", "not a value in gin syntax"),
        ("TRAIN_STEPS=", "not a value in gin syntax"),
        ("TRAIN_STEPS=1e3", "takes int, not 1000.0 (float)"),
        ("TRAIN_STEPS=True", "takes int, not True (bool)"),
    ],
)
def test_what_is_no_value_is_refused(gin_file, toy_gin, binding, message):
    bindings = ["MODEL_DIR=/x", binding]
    assert message in errors([gin_file(toy_gin)], bindings, entry=ENTRY)


def test_required_inside_a_container(gin_file, toy_gin):
    text = errors([gin_file(toy_gin)], ["MODEL_DIR=/x", "RATE=[1, %gin.REQUIRED]"], entry=ENTRY)
    assert "'RATE' is required" in text
    path = gin_file(toy_gin + "toy_run.train.model = {'a': %gin.REQUIRED}\n")
    text = errors([path], ["MODEL_DIR=/x"], entry=ENTRY)
    assert "'toy_run.train.model' is required" in text


def test_arguments_must_be_bound_in_the_scope_of_the_call(gin_file, toy_gin):
    lines = "toy_run.train.optimizer = @toy_net.optimizer()\ntoy_net.optimizer.rate = %RATE\n"
    assert lines.partition("\n")[0] in toy_gin
    scoped = toy_gin.replace("toy_net.optimizer.rate", "x/toy_net.optimizer.rate")
    more = "toy_run.train.model = @x/toy_net.Net()\n"
    text = errors([gin_file(scoped + more)], ["MODEL_DIR=/x"], entry=ENTRY)
    assert "'toy_net.optimizer' is called without rate" in text
    more += "toy_run.train.optimizer = @x/toy_net.optimizer()\n"
    config = gin_config.load([gin_file(scoped + more)], ["MODEL_DIR=/x"], entry=ENTRY)
    assert config.entry()["optimizer"] == ("adam", 0.5, None)
    more += "toy_run.train.optimizer = @x/y/toy_net.optimizer()\n"
    gin_config.load([gin_file(scoped + more)], ["MODEL_DIR=/x"], entry=ENTRY)


def test_what_nothing_calls_needs_no_arguments(gin_file, toy_gin):
    more = "toy_net.Factored.rank = @toy_net.optimizer()\ntoy_run.train.optimizer = None\n"
    without_rate = toy_gin.replace("toy_net.optimizer.rate = %RATE", "").replace("RATE = 0.5", "")
    gin_config.load([gin_file(without_rate + more)], ["MODEL_DIR=/x"], entry=ENTRY)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("'english'", "takes a list of str or None, not 'english' (str): write ['english']"),
        ("english", "takes a list of str or None, not 'english' (str): write ['english']"),
        ("[1]", "takes a list of str or None, not [1] (list)"),
        ("@toy_net.optimizer", "not @toy_net.optimizer (a function or class)"),
        ("['english']", None),
        ("('english', %RATE)", "takes a list of str or None, not ('english', 0.5) (tuple)"),
        ("('english', %MODEL_DIR)", None),
        ("@toy_net.optimizer()", None),
        ("None", None),
    ],
)
def test_sequences(gin_file, toy_gin, value, message):
    arguments = ([gin_file(toy_gin)], ["MODEL_DIR=/x", f"toy_run.train.names={value}"])
    if message is None:
        gin_config.load(*arguments, entry=ENTRY)
    else:
        text = errors(*arguments, entry=ENTRY)
        assert "1 problem in" in text
        assert message in text


def test_a_function_where_a_list_of_functions_is_taken():
    files = [f"t5x_configs/{name}.gin" for name in ("models/tiny", "data/bytes", "runs/pretrain")]
    text = errors(
        files,
        ["MODEL_DIR='/x'", "MIXTURE_OR_TASK_NAME='x'", "TASKS=@tasks.register_corpus"],
        entry="espalier.launch.train:train",
    )
    assert "'espalier.launch.train.train.tasks' takes a list" in text
    assert "write [@tasks.register_corpus]" in text


def test_the_long_form_of_a_macro(gin_file, toy_gin):
    path = gin_file(toy_gin + "TRAIN_STEPS/gin.macro.value = 4\n")
    config = gin_config.load([path], ["MODEL_DIR=/x"], entry=ENTRY)
    assert config.entry()["steps"] == 4
    assert config.macros["TRAIN_STEPS"] == 4


def test_a_file_that_is_no_text(gin_file, tmp_path):
    path = tmp_path / "latin.gin"
    path.write_bytes("A = 'é'\n".encode("latin-1"))
    text = errors([str(path)])
    assert text.startswith("1 problem")
    assert f"'{path}' cannot be read: it is not UTF-8 text (byte 5" in text


def test_a_part_of_another_entry_points_configuration(gin_file, toy_gin):
    """What is not reached may be open and without effect; what is reached is checked as ever."""
    path = gin_file(toy_gin + "EXTRA = 3\ntoy_run.where.steps = %STEPS\ntoy_run.train.model = %M\n")
    bindings = ["TRAIN_STEPS=5", "STEPS=2", "toy_net.Net.layers=2"]
    config = gin_config.load([path], bindings, entry="toy_run:where", part=True)
    assert config.arguments() == {"steps": 2}
    assert config.warnings == ()
    text = errors([path], bindings[:1], entry="toy_run:where", part=True)
    assert text.startswith("1 problem") and "macro 'STEPS' has no value" in text
    text = errors([path], [*bindings, "TRAIN_STEP=5"], entry="toy_run:where", part=True)
    assert text.startswith("1 problem") and "Nearest: TRAIN_STEPS" in text


def test_configurations_are_values_beside_each_other(gin_file, toy_gin):
    first, second = (
        gin_config.load([gin_file(toy_gin)], ["MODEL_DIR=/x", f"RATE={rate}"], entry=ENTRY)
        for rate in (0.25, 0.75)
    )
    assert first.entry()["optimizer"] == ("adam", 0.25, None)
    assert second.entry()["optimizer"] == ("adam", 0.75, None)
    assert gin.config_str() == gin.operative_config_str() == ""
    assert build.running() is None
    with first.in_use():
        assert build.running() is first


DECORATED = """
import gin


@gin.configurable
def helper(x=1):
    return x


@gin.configurable(denylist=["fixed"])
def run(*, part=None, fixed=2):
    return helper(), part, fixed


@gin.configurable
class Part:
    def __init__(self, size=1):
        self.size = size + helper()
"""


def test_functions_with_gins_own_decorator_get_their_bindings_where_code_calls_them(
    gin_file, tmp_path, monkeypatch
):
    (tmp_path / "own_decorated.py").write_text(DECORATED)
    monkeypatch.syspath_prepend(tmp_path)
    head = "from __gin__ import dynamic_registration\nimport own_decorated\n"
    file = gin_file(
        head
        + "own_decorated.helper.x = 7\ns/own_decorated.helper.x = 8\nown_decorated.Part.size = 10\n"
        + "own_decorated.run.part = @s/own_decorated.Part()\n"
    )
    config = gin_config.load([file], entry="own_decorated:run")
    x, part, fixed = config.entry()
    assert (x, part.size, fixed) == (7, 18, 2)
    assert "own_decorated.helper.x = 7" in config.operative_text()
    text = errors([file], ["own_decorated.run.fixed=3"], entry="own_decorated:run")
    assert "fixed" in text
    # The next configuration without such bindings leaves none in gin.
    bare = gin_config.load([gin_file(head, "bare.gin")], entry="own_decorated:run")
    assert bare.entry() == (1, None, 2) and gin.config_str() == ""


def test_bindings_of_a_method_hold_where_code_calls_it(gin_file, tmp_path, monkeypatch):
    code = "class Own:\n    def sized(self, by=1):\n        return by\n\n\ndef run(*, own):\n    return own.sized()\n"
    (tmp_path / "own_methods.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    head = "from __gin__ import dynamic_registration\nimport own_methods\n"
    text = head + "own_methods.run.own = @own_methods.Own()\nown_methods.Own.sized.by = 5\n"
    config = gin_config.load([gin_file(text)], entry="own_methods:run")
    assert config.entry() == 5
    assert gin_config.load([gin_file(config.text)], entry="own_methods:run").text == config.text


def test_the_last_binding_of_an_object_wins_whatever_its_name(gin_file):
    names = ["json.JSONDecoder", "json.decoder.JSONDecoder", "json.JSONDecoder"]
    lines = [f"{name}.strict = {value}" for value, name in enumerate(names)]
    text = ["from __gin__ import dynamic_registration", "import json.decoder", *lines]
    config = gin_config.load([gin_file("\n".join(text) + "\n")])
    assert config.value("JSONDecoder.strict") == 2
    assert config.text.count("strict") == 1


def test_later_files_and_flags_win_and_relative_files_are_found(gin_file, toy_gin, tmp_path):
    gin_file(toy_gin, "base.gin")
    gin_file("include 'base.gin'\nTRAIN_STEPS = 20\n", "child.gin")
    args = (["child.gin"], ["MODEL_DIR=/x"], [str(tmp_path)])
    assert gin_config.load(*args, entry=ENTRY).macros["TRAIN_STEPS"] == 20
    args = (["child.gin"], ["MODEL_DIR=/x", "TRAIN_STEPS=30"], [str(tmp_path)])
    assert gin_config.load(*args, entry=ENTRY).macros["TRAIN_STEPS"] == 30


def test_names_of_several_modules_cannot_be_used_on_the_command_line(gin_file, toy_gin):
    other = gin_file(
        "from __gin__ import dynamic_registration\nfrom espalier.model import mlp as toy_net\n",
        "other.gin",
    )
    bindings = ["MODEL_DIR=/x", "toy_net.Net.layers=2"]
    text = errors([gin_file(toy_gin), other], bindings, entry=ENTRY)
    assert "toy_net and espalier.model.mlp" in text


def test_files_relative_to_the_root_are_found_from_anywhere(gin_file, tmp_path, monkeypatch):
    from espalier.model import transformer

    monkeypatch.chdir(tmp_path)
    head = "from __gin__ import dynamic_registration\nimport toy_run\n"
    gin_file(head + "include 't5x_configs/models/tiny.gin'\ntoy_run.train.model = %MODEL\n")
    config = gin_config.load(["run.gin"], entry=ENTRY)
    assert isinstance(config.entry()["model"], transformer.Transformer)
    assert all(
        path == "run.gin" or path.startswith(gin_config.gin_source.ROOT) for path in config.files
    )
    gin_config.load(["t5x_configs/models/tiny.gin", "run.gin"], entry=ENTRY)


def test_the_model_dir_of_a_runs_config_means_the_runs_folder_or_is_refused(
    gin_file, toy_gin, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    gin_file(toy_gin + "MODEL_DIR = 'runs/a'\n", "config.gin")
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (tmp_path / "config.gin").rename(run / "config.gin")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    monkeypatch.chdir(elsewhere)
    record = "../runs/a/config.gin"
    gin_config.load([record], entry=ENTRY)  # of no run
    (run / "run.json").write_text("{}")
    message = errors([record], entry=ENTRY)
    assert "of the run in ../runs/a" in message and "--gin.MODEL_DIR=../runs/a" in message
    assert str(elsewhere / "runs" / "a") in message
    for value in ("../runs/a", "new"):
        gin_config.load([record], [f"MODEL_DIR={value}"], entry=ENTRY)
    gin_config.load([record], entry=ENTRY, part=True)  # such as an evaluation of the run
    monkeypatch.chdir(tmp_path)
    gin_config.load(["runs/a/config.gin"], entry=ENTRY)
    run.rename(tmp_path / "moved")
    assert "--gin.MODEL_DIR=moved" in errors(["moved/config.gin"], entry=ENTRY)
