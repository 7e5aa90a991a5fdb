"""Shares of groups, languages and sets; files that are missing, misnamed or unknown; sets of packaged text."""

import json
import pathlib
import types

import pytest

from espalier.data import tasks
from espalier.data.aya23 import mixture, packaged
from espalier.data.tasks import in_seqio
from espalier.data.tokenizers import vocabularies
from espalier.launch.config import gin_config


@pytest.fixture(autouse=True)
def clean():
    yield
    tasks.clear()


def write(path, count):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"{path.stem} {i}?", "completion": f"{i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_shares_within_a_group_are_by_temperature_of_languages_and_rows_of_sets():
    rows = {"a_en": 900, "b_en": 100, "a_cs": 10}
    proportional = mixture.shares(rows, 1.0)
    assert proportional == pytest.approx(
        {"a_en": 900 / 1010, "b_en": 100 / 1010, "a_cs": 10 / 1010}
    )
    third = mixture.shares(rows, 3.0)  # cube roots: 10 and 10 ** (1 / 3)
    root = 10 ** (1 / 3)
    assert third["a_cs"] == pytest.approx(root / (10 + root))
    assert third["a_en"] / third["b_en"] == pytest.approx(9)
    assert sum(third.values()) == pytest.approx(1)
    capped = mixture.shares(rows, 1.0, cap=100)
    assert capped == pytest.approx({"a_en": 100 / 210, "b_en": 100 / 210, "a_cs": 10 / 210})


def test_groups_have_their_weights_whatever_their_sizes(tmp_path):
    seqio = in_seqio()

    for code, count in (("en", 40), ("cs", 10)):
        write(tmp_path / "human" / "asked" / f"{code}.jsonl", count)
    write(tmp_path / "synthetic" / "made" / "zh-Hant.jsonl", 20)
    sets = {"human": ["asked"], "synthetic": ["made"]}
    mixture.register_instructions(
        name="aya23",
        data_dir=tmp_path,
        vocabulary=vocabularies.byte(),
        sets=sets,
        temperature=1.0,
        validation_fraction=0.0,
        cache_dir=tmp_path / "cache",
    )
    whole = seqio.MixtureRegistry.get("aya23")
    rates = {task.name: whole.get_rate(task) for task in whole.tasks}
    human, synthetic = 0.08 / 0.38, 0.30 / 0.38
    assert rates == pytest.approx(
        {"asked_en": 0.8 * human, "asked_cs": 0.2 * human, "made_zh": synthetic}
    )
    assert mixture.epoch_caps(data_dir=tmp_path, sets=sets) == {"asked_en": 8.0, "asked_cs": 8.0}
    only = mixture.find(tmp_path, sets, ["cs", "zh"])
    assert {group: list(found) for group, found in only.items()} == {
        "human": ["asked_cs"],
        "synthetic": ["made_zh"],
    }


def test_refusals_have_at_most_their_share_whatever_their_number(tmp_path):
    """The file data/safety.gin: w / (1 + w) of the tokens beside the paper's groups, and a cap of epochs."""
    seqio = in_seqio()
    for code, count in (("cs", 90), ("hi", 10)):
        write(tmp_path / "safety" / "refusals" / f"{code}.jsonl", count)
    for group, names in mixture.SETS.items():
        for name in names:
            write(tmp_path / group / name / "en.jsonl", 3)
    config = gin_config.load(
        [
            f"t5x_configs/{x}.gin"
            for x in ("models/tiny", "data/aya23", "runs/finetune", "data/safety")
        ],
        [
            "SAFETY_WEIGHT=0.25",
            "MODEL_DIR='x'",
            "INITIAL_CHECKPOINT_PATH='y'",
            "INSTRUCTION_TEMPERATURE=1.0",
            "TOKENIZER='bytes'",
            f"INSTRUCTIONS_DIR={str(tmp_path)!r}",
            f"mixture.register_instructions.cache_dir={str(tmp_path / 'cache')!r}",
            "mixture.register_instructions.validation_fraction=0.0",
        ],
        entry="espalier.launch.train:train",
    )
    (register,) = config.arguments()["tasks"]
    register()
    whole = seqio.MixtureRegistry.get("aya23")
    rates = {task.name: whole.get_rate(task) for task in whole.tasks}
    assert rates["refusals_cs"] == pytest.approx(0.9 * 0.25 / 1.25)
    assert rates["refusals_hi"] == pytest.approx(0.1 * 0.25 / 1.25)
    assert rates["aya_dataset_en"] == pytest.approx(0.08 / 1.25) and len(rates) == 9
    sets, epochs = config.macros["INSTRUCTION_SETS"], config.macros["SAFETY_EPOCHS"]
    caps = mixture.epoch_caps(data_dir=tmp_path, sets=sets, caps={"human": 8.0, "safety": epochs})
    assert caps == {"aya_dataset_en": 8.0, "refusals_cs": 4.0, "refusals_hi": 4.0}


def test_every_missing_set_is_named_with_its_origin(tmp_path):
    write(tmp_path / "human" / "aya_dataset" / "en.jsonl", 1)
    with pytest.raises(FileNotFoundError) as raised:
        mixture.find(tmp_path)
    text = str(raised.value)
    assert text.startswith("6 sets of the mixture are missing")
    assert f"xp3x (templated): no file in {tmp_path}/templated/xp3x; from CohereLabs/xP3x" in text
    assert "aya_dataset" not in text and "sharegpt_command_r_plus (synthetic)" in text


def test_files_and_groups_that_do_not_exist_in_the_mixture_are_errors(tmp_path):
    write(tmp_path / "human" / "asked" / "klingon.jsonl", 1)
    with pytest.raises(ValueError, match="klingon.jsonl: a file's name is its language"):
        mixture.find(tmp_path, {"human": ["asked"]})
    with pytest.raises(ValueError, match="unknown group 'humans'; did you mean 'human'"):
        mixture.find(tmp_path, {"humans": ["asked"]})
    write(tmp_path / "human" / "both" / "en.jsonl", 1)
    with pytest.raises(ValueError, match="'both' is in human and in synthetic"):
        mixture.find(tmp_path, {"human": ["both"], "synthetic": ["both"]})


def test_a_change_of_any_module_that_makes_the_rows_makes_them_again(monkeypatch):
    read = []
    monkeypatch.setattr(packaged.fingerprint, "of_code", lambda files: read.extend(files) or "")
    packaged._code_digest.__wrapped__()
    imported = [x for x in vars(packaged).values() if isinstance(x, types.ModuleType)]
    rules = [
        x for x in imported if x.__name__.startswith(("espalier.data.text", "espalier.data.l"))
    ]
    assert len(rules) == 7
    assert {*map(str, read)} == {packaged.__file__, *(x.__file__ for x in rules)}


def test_packaged_sets_have_four_groups_of_rows_in_the_language(tmp_path):
    settings = {"languages": ["cs", "ja"], "rows": 30, "cache_dir": tmp_path}
    folder = packaged.assemble(**settings)
    assert packaged.assemble(**settings) == folder
    files = mixture.find(folder, packaged.SETS, ["cs", "ja"])
    assert {group: sorted(found) for group, found in files.items()} == {
        "human": ["dialogues_ja"],  # chatterbot-corpus has no Czech
        **{
            group: [f"{name}_cs", f"{name}_ja"]
            for group, name in (
                ("templated", "translate"),
                ("translated", "complete"),
                ("synthetic", "repeat"),
            )
        },
    }
    text = pathlib.Path(files["synthetic"]["repeat_cs"][0]).read_text("utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 30 and {row["language"] for row in rows} == {"cs"}
    assert all([m["role"] for m in row["messages"]] == ["user", "assistant"] for row in rows)
    assert all(row["messages"][1]["content"] in row["messages"][0]["content"] for row in rows)
