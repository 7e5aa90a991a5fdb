"""Files of methods add to each other through slots, and never replace each other's bindings unnoticed."""

import itertools

import pytest

from espalier.launch.config import gin_config
from espalier.launch.config.gin_config import ConfigError

ENTRY = "toy_run:train"
HEAD = "from __gin__ import dynamic_registration\nimport toy_net\nimport toy_run\n"


@pytest.fixture
def base(gin_file, toy_gin):
    slots = "toy_run.train.optimizer = @toy_net.named()\ntoy_net.named.z = @toy_net.optimizer()\n"
    return gin_file(toy_gin + slots)


def load(files, *bindings):
    return gin_config.load(files, ["MODEL_DIR=/x", *bindings], entry=ENTRY)


def errors(files, *bindings) -> str:
    with pytest.raises(ConfigError) as caught:
        load(files, *bindings)
    return str(caught.value)


def test_slots_of_several_files_are_filled_in_any_order(base, method):
    files = [
        method(HEAD + "toy_net.named.b = @toy_net.Net\n", "b.gin"),
        method(
            HEAD + "toy_net.named.a = @toy_net.optimizer()\ntoy_net.optimizer.decay = 1.0\n",
            "a.gin",
        ),
    ]
    texts = set()
    for pair in itertools.permutations(files):
        config = load([base, *pair])
        first, second, last = config.entry()["optimizer"]
        assert first == last
        assert first == ("adam", 0.5, 1.0) and callable(second)
        texts.add(config.text)
    assert len(texts) == 1
    config = load([base, *files], "toy_net.named.b=None")
    assert config.entry()["optimizer"] == [("adam", 0.5, 1.0)] * 2


def test_what_a_slot_holds_is_checked_as_everything_else(base, method, gin_file):
    path = method(HEAD + "toy_net.named.a = @toy_net.optimizr()\n")
    assert "has no 'optimizr'\n" in errors([base, path])
    path = method(
        HEAD + "toy_net.named.a = @toy_net.optimizer()\ntoy_net.optimizer.kind = 'adan'\n"
    )
    assert "cannot be 'adan'" in errors([base, path])
    # Its required arguments, in its own scope.
    own = HEAD + "toy_run.train.optimizer = @toy_net.named()\ntoy_run.train.model = None\n"
    own += "toy_net.named.a = @x/toy_net.optimizer()\nx/toy_net.optimizer.kind = 'lion'\n"
    with pytest.raises(ConfigError, match="called in the scope 'x' without rate"):
        gin_config.load([gin_file(own, "own.gin")], entry=ENTRY)


def test_an_empty_slot_cannot_be_emptied(base, method):
    path = method(HEAD + "toy_net.named.spectrum = @toy_net.Net\n")
    text = errors([base, path], "toy_net.named.spectrm=None")
    assert "no file fills this slot\n  Nearest: spectrum." in text
    assert "Filled are: z, spectrum" in errors([base, path], "toy_net.named.other=None")


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ("toy_net.Net.layers = 1\n", "toy_net.Net.layers = 2\n", "toy_net.Net.layers"),
        ("RATE = 1.0\n", "RATE = 2.0\n", "RATE"),
        ("a/toy_net.Net.layers = 1\n", "a/toy_net.Net.layers = 2\n", "a/toy_net.Net.layers"),
        (
            "toy_net.named.a = @toy_net.Net\n",
            "toy_net.named.a = @toy_net.Block\n",
            "toy_net.named.a",
        ),
    ],
)
def test_one_method_may_not_replace_what_another_binds(base, method, first, second, name):
    more = "toy_run.train.steps = 5\ntoy_net.named.x = @a/toy_net.Net\n"
    files = [method(HEAD + more + first, "a.gin"), method(HEAD + more + second, "b.gin")]
    for a, b in (files, files[::-1]):
        text = errors([base, a, b])
        assert text.startswith("1 problem ")
        assert f"{b}:6: replaces '{name}' of another method, which is " in text
        assert f" at {a}:6" in text and f"--gin.{name}=VALUE" in text


def test_several_replaced_names_are_one_problem(base, method):
    a = method(HEAD + "RATE = 1.0\ntoy_net.Net.layers = 1\n", "a.gin")
    b = method(HEAD + "RATE = 2.0\ntoy_net.Net.layers = 2\n", "b.gin")
    text = errors([base, a, b])
    assert (
        text.startswith("1 problem ")
        and "'RATE' of another method (and toy_net.Net.layers)" in text
    )


def test_equal_values_and_own_files_and_the_command_line_are_free(base, method, gin_file):
    a = HEAD + "RATE = 1.0\ntoy_net.named.x = @toy_net.Net\ntoy_run.train.steps = 3\n"
    a = method(a, "a.gin")
    same = "import toy_net as other\ntoy_net.named.x = @other.Net\n"
    same = method(HEAD + same + "RATE = 1.0\ntoy_net.Net.layers = 1\n", "same.gin")
    assert load([base, a, same]).macros["RATE"] == 1.0
    b = method(HEAD + "RATE = 2.0\n", "b.gin")
    assert load([base, a, b], "RATE=3.0").macros["RATE"] == 3.0
    mine = gin_file("RATE = 4.0\n", "mine.gin")
    assert load([base, a, b, mine]).macros["RATE"] == 4.0
    assert load([base, a, mine, b]).macros["RATE"] == 2.0


def test_a_file_refines_what_it_includes_and_only_that(base, method):
    a = method(HEAD + "RATE = 1.0\n", "a.gin")
    finer = method(f"include '{a}'\nRATE = 2.0\n", "finer.gin")
    finest = method(f"include '{finer}'\nRATE = 3.0\n", "finest.gin")
    assert load([base, finest]).macros["RATE"] == 3.0
    assert load([base, a, finer]).macros["RATE"] == 2.0
    assert f"{a}:4: replaces 'RATE' of another method, which is 2.0" in errors([base, finer, a])
    # Read twice: 1, 2, 1, 3 in the end, of which `finest` includes the others.
    assert load([base, finer, finest]).macros["RATE"] == 3.0
    other = method(HEAD + "RATE = 5.0\n", "other.gin")
    both = method(f"include '{a}'\ninclude '{other}'\n", "both.gin")
    assert f"{other}:4: replaces 'RATE'" in errors([base, both])


def test_a_value_that_is_set_before_its_default_is_refused(base, gin_file):
    default = gin_file("RATE = 1.0\n", "default.gin")
    early = gin_file(f"RATE = 2.0\ninclude '{default}'\n", "early.gin")
    text = errors([base, early])
    assert (
        f"{early}:1: 'RATE' has no effect: {default}:1, which is read later, sets it to 1.0" in text
    )
    late = gin_file(f"include '{default}'\nRATE = 2.0\n", "late.gin")
    assert load([base, late]).macros["RATE"] == 2.0
    assert "'RATE' has no effect" in errors([base, late, default])
    assert load([base, late, default], "RATE=3.0").macros["RATE"] == 3.0
    assert load([base, gin_file("RATE = 2.0\n", "mine.gin"), default]).macros["RATE"] == 1.0


def test_a_value_that_is_set_before_the_shipped_file_of_its_default_is_refused(gin_file):
    model = "t5x_configs/models/tiny.gin"
    mine = gin_file("VOCAB_SIZE = 1000\n", "mine.gin")
    mesh, run = "t5x_configs/partitioning/tp.gin", "t5x_configs/runs/base.gin"
    for files, place in (([mine, model], f"{mine}:1: 'VOCAB_SIZE'"), ([mesh, run], "'MESH'")):
        (problem,) = gin_config.check(files, fragment=True).problems
        assert f"{place} has no effect: t5x_configs/" in str(problem)
        assert gin_config.check(files[::-1], fragment=True).problems == []
    record = gin_file("VOCAB_SIZE = 1000\n", "config.gin")  # of a run, which other files change
    assert gin_config.check([record, model], fragment=True).problems == []


def test_a_file_may_name_what_it_replaces(base, method):
    a = method(HEAD + "RATE = 1.0\ntoy_net.Net.layers = 1\n", "a.gin")
    text = "RATE = 2.0\ntoy_net.Net.layers = 2\n"
    b = method(HEAD + "REPLACES = ['RATE', 'Net.layers']\n" + text, "b.gin")
    assert load([base, a, b]).macros["RATE"] == 2.0
    b = method(HEAD + "REPLACES = ['RATE']\n" + text, "b.gin")
    assert "replaces 'toy_net.Net.layers'" in errors([base, a, b])


def test_a_method_without_effect_is_refused(base, method, gin_file):
    idle = method(HEAD + "toy_net.Factored.rank = 3\n", "idle.gin")
    text = errors([base, idle])
    assert f"{idle}: has no effect: this run uses nothing that only this file binds" in text
    dense = method(HEAD + "toy_net.Dense.bias = True\n", "dense.gin")
    other = method(HEAD + "toy_net.Block.dense = @toy_net.Factored\n", "other.gin")
    assert "other.gin replaces everything that it binds" in errors([base, dense, other])
    assert f"{dense}: has no effect: this run uses nothing" in errors([base, other, dense])
    mine = gin_file(HEAD + "toy_net.Block.dense = @toy_net.Factored\n", "mine.gin")
    assert load([base, dense, mine]).warnings == ()
    slot = method(HEAD + "toy_net.named.a = @toy_net.Net\n", "slot.gin")
    load([base, slot], "toy_net.named.a=None")
    twin = method(HEAD + "toy_net.named.a = @toy_net.Net\n", "twin.gin")
    assert "nothing that only this file binds" in errors([base, slot, twin])
    load([base, slot, slot])
    load([base, slot, method(HEAD + f"include '{slot}'\ntoy_net.Net.layers = 1\n", "more.gin")])
