"""Policies by name, and their settings from code and from the command line."""

import dataclasses
import re

import pytest

from espalier.launch.generate import CACHE_POLICIES
from espalier.model.kv_cache.full import FullCache
from espalier.model.kv_cache.policies import POLICIES, policy_from_text, policy_named
from espalier.model.kv_cache.selecting import H2O


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("snap", {}, "Unknown cache policy 'snap'.*snapkv"),
        ("snapkv", {"size": 3}, "'snapkv': it has no size. Its settings: capacity: int = 1024, kernel"),
        ("snapkv", {"capacity": 8, "window": 8}, "window = 8 must be at least 1 and below capacity = 8"),
        ("snapkv", {"kernel": 4}, "kernel = 4 must be odd.*kernel: int = 7"),
        ("snapkv", {"pooling": "min"}, "pooling = 'min' must be one of .*'max', 'average'"),
        ("adakv", {"safeguard": 2.0}, "safeguard = 2.0 must be between"),
        ("pyramidkv", {"beta": 0.5}, "beta = 0.5"),
        ("streaming_llm", {"sinks": 8, "capacity": 8}, "sinks = 8"),
        ("oracle", {"future": 0}, "future = 0"),
        ("sliding", {"window": 0}, "window = 0"),
        ("h2o", {"group_vote": "sum"}, "group_vote = 'sum'"),
        ("tova", {"capacity": 0}, "capacity = 0"),
        ("tova", {"kernel": 2}, "kernel = 2 must be odd"),
        ("h2o", {"pooling": "min"}, "pooling = 'min' must be one of"),
        ("full", {"capacity": 9}, "'full': it has no capacity. It has no settings"),
    ],
)  # fmt: skip
def test_bad_settings_are_one_error_that_lists_the_good(name, settings, said):
    with pytest.raises(ValueError, match=said):
        policy_named(name, **settings)


def test_settings_may_be_texts():
    text = {"capacity": "64", "window": "16", "kernel": "5", "pooling": "average"}
    assert policy_from_text("snapkv", text) == policy_named(
        "snapkv", capacity=64, window=16, kernel=5, pooling="average"
    )
    assert policy_from_text("h2o", {"window": "none"}) == policy_named("h2o")
    assert policy_from_text("streaming_llm", {"renumber": "false"}).renumber is False
    assert policy_from_text("adakv", {"safeguard": "0.5"}).safeguard == 0.5
    with pytest.raises(ValueError, match="capacity = '1k' is not of type int. Its settings"):
        policy_from_text("snapkv", {"capacity": "1k"})
    with pytest.raises(ValueError, match="renumber = 'maybe' is not of type bool"):
        policy_from_text("streaming_llm", {"renumber": "maybe"})
    with pytest.raises(ValueError, match="it has no sinks"):
        policy_from_text("snapkv", {"sinks": "4"})


def test_a_list_of_policies_has_settings_by_entry():
    found = policy_from_text("2*full; snapkv capacity=64 window=16 ;h2o", {})
    snap = policy_named("snapkv", capacity=64, window=16)
    assert found.policies == (FullCache(), FullCache(), snap, H2O())


@pytest.mark.parametrize(
    ("text", "settings", "said"),
    [
        ("full; snapkv", {"window": "3"}, "write window after the names that it is for"),
        ("full; snapkv window", {}, "'snapkv window' is not .N.*NAME"),
        ("full; snapkv window=3 window=4", {}, "with each setting once"),
        ("full;", {}, "Unknown cache policy ''"),
        ("full; 0*snapkv", {}, "'0.snapkv' is not"),
        ("full; 99999*snapkv", {}, "'99999.snapkv' is not"),
        ("full; snapkv kernel=4", {}, "'snapkv': kernel = 4 must be odd"),
        ("full; oracle", {}, "Oracle cannot be the cache policy of some layers only"),
    ],
)
def test_a_malformed_list_of_policies_is_named(text, settings, said):
    with pytest.raises(ValueError, match=said):
        policy_from_text(text, settings)


def test_the_help_of_generate_lists_every_policy_and_setting():
    """Names and defaults are those of the classes; the oracle is not for generation."""
    defaults = {
        name: {field.name: str(field.default) for field in dataclasses.fields(policy)}
        for name, policy in POLICIES.items()
        if name != "oracle"
    }
    said = {}
    for entry in re.split(r"\n(?=\S)", CACHE_POLICIES):
        name = entry.split()[0]
        said[name] = dict(re.findall(r"(\w+)=(\S+?),?(?=\s|$)", entry))
        if "the settings of snapkv" in entry:
            said[name] |= said["snapkv"]
    assert said == defaults
