"""The configuration that is built without gin's state equals gin's: its text, and the bindings that building its objects uses."""

import itertools
import pathlib

import gin
import pytest

from launch.config import gin_check, gin_config, gin_source
from launch.config.build import Configuration
from launch.config.gin_reader import is_required
from tests import methods_test

ROOT = pathlib.Path(gin_source.ROOT)
FILES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "t5x_configs").rglob("*.gin"))


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config(clear_constants=True)


@pytest.mark.parametrize("file", FILES)
def test_a_file_has_the_text_that_gin_writes(file):
    checked = gin_check.check([file], fragment=True)
    names = dict.fromkeys([*checked.macros, *checked.macros_read])
    bindings = [f"{n}=None" for n in names if gin_config._is_open(n, checked)]
    for (scope, target, argument), bound in checked.bindings.items():
        if is_required(bound.value):  # which gin refuses
            pytest.skip(f"{scope} {target}.{argument} is required")
    tree = gin_check.check([file], bindings, fragment=True)
    gin_config._load_into_gin([file], bindings, [], tree)
    assert Configuration(tree).text() == gin.config_str()


@pytest.mark.parametrize("method", methods_test.METHODS)
def test_methods_and_pairs_of_them_use_the_same_bindings(method):
    pairs = [p for p in itertools.permutations(methods_test.METHODS, 2) if p[0] == method]
    for methods in ((method,), *pairs):
        run = methods_test.common_run(*methods)
        if run is None:
            continue
        try:
            config = methods_test.load(run, methods)
        except gin_config.ConfigError:
            continue
        new = Configuration(config.tree)
        assert new.text() == gin.config_str()
        entry = config.tree.targets["launch.train.train"]
        results = []
        for make in (config.arguments, lambda new=new: new.arguments(entry)):
            try:
                results.append(sorted(make()))
            except ValueError as error:
                results.append(str(error).partition("\n  In call to configurable")[0])
        assert results[0] == results[1]
        assert new.operative_text() == gin.operative_config_str()
        gin.clear_config()
