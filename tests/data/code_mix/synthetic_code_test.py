"""Verified synthetic code: documents are programs that pass, faults are caught, and it is a source."""

import ast
import collections
import itertools
import json

import pytest

from espalier.data import tasks
from espalier.data.code_mix import synthetic_code
from espalier.data.code_mix.synthetic.render import Rendered
from espalier.data.sandbox import code_sandbox
from espalier.data.stream import stream
from espalier.data.tokenizers import vocabularies


@pytest.fixture(scope="module")
def sandbox():
    with code_sandbox.Sandbox(code_sandbox.Limits(cpu_seconds=2, wall_seconds=60)) as made:
        yield made


@pytest.fixture(scope="module")
def drawn():
    return list(itertools.islice(synthetic_code.draw(1, mutated_share=0.05), 1500))


def test_every_family_is_drawn_and_every_document_passes(sandbox, drawn):
    whole = [one for one in drawn if not one.mutated]
    families = collections.Counter(one.family for one in whole)
    assert len(families) == len(synthetic_code.FAMILIES) >= 25 and min(families.values()) >= 5
    passed = synthetic_code.verify(sandbox, [one.document.text for one in whole])
    assert [one for one, good in zip(whole, passed, strict=True) if not good] == []


def test_documents_state_solve_and_test(drawn):
    keys = {one.document.key for one in drawn}
    assert len(keys) > 700
    assert len({one.document.text for one in drawn}) == len(drawn)
    for one in drawn:
        tree = ast.parse(one.document.text)
        function = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
        assert ast.get_docstring(function) or one.document.text.startswith("# ")
        asserts = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
        assert asserts and len(tree.body) >= 2


def test_most_faults_are_caught(sandbox, drawn):
    faulty = [one.document.text for one in drawn if one.mutated][:30]
    results = [future.result() for future in map(sandbox.submit, faulty)]
    # Some faults change nothing that the function returns.
    assert 0.6 < sum(not result.passed for result in results) / len(faulty) < 1


def test_one_bad_program_drops_no_other_of_its_group(sandbox):
    programs = ["assert True"] * 45
    programs[3] = "assert False"
    programs[7] = "raise SystemExit"
    programs[30] = "import os; os._exit(0)"
    found = synthetic_code.verify(sandbox, programs)
    assert [i for i, passed in enumerate(found) if not passed] == [3, 7, 30]


@pytest.fixture
def build(tmp_path):
    def call(**settings):
        folder = synthetic_code.build(cache_dir=tmp_path, **settings)
        rows = {
            split: [
                json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()
            ]
            for split in ("train", "validation")
        }
        return folder, rows, json.loads((folder / "manifest.json").read_text())

    return call


def test_a_build_is_what_was_asked_for_and_found_again(build, monkeypatch):
    settings = {"num_documents": 120, "seed": 3, "mutated_share": 0.1, "validation_fraction": 0.2}
    folder, rows, manifest = build(**settings)
    texts = [row["text"] for row in rows["train"] + rows["validation"]]
    assert len(texts) == len(set(texts)) == 120
    assert manifest["documents"] == {split: len(own) for split, own in rows.items()}
    assert 10 < len(rows["validation"]) < 40
    # What was drawn with a fault is no document.
    drawn = list(itertools.islice(synthetic_code.draw(3, mutated_share=0.1), 400))
    assert not set(texts) & {one.document.text for one in drawn if one.mutated}
    problem = {one.document.text: one.document.key for one in drawn}
    assert max(collections.Counter(problem[text] for text in texts).values()) <= 3
    train, held_out = ({problem[row["text"]] for row in rows[s]} for s in ("train", "validation"))
    assert not train & held_out
    monkeypatch.setattr(synthetic_code, "_build", None)  # not built again
    assert build(**settings)[0] == folder


def test_what_does_not_pass_is_dropped_and_counted(build, monkeypatch):
    def draw(seed, mutated_share):
        for number in itertools.count():
            text = f"assert {number} % 3\n"
            yield synthetic_code.Candidate("third", Rendered(text, text), mutated=number % 2 == 1)

    monkeypatch.setattr(synthetic_code, "draw", draw)
    monkeypatch.setattr(synthetic_code, "_ROUND", 60)
    _, rows, manifest = build(num_documents=20, validation_fraction=0.0)
    numbers = [int(row["text"].split()[1]) for row in rows["train"]]
    assert numbers == [n for n in range(60) if n % 2 == 0 and n % 3]
    assert (manifest["dropped"], manifest["mutated"], manifest["mutated_passed"]) == (10, 30, 20)
    assert manifest["families"] == {"third": 20} and rows["validation"] == []


def test_it_ends_where_nothing_passes(build, monkeypatch):
    def draw(seed, mutated_share):
        for number in itertools.count():
            text = f"assert {number} < 30\n"
            yield synthetic_code.Candidate("few", Rendered(text, text), mutated=False)

    monkeypatch.setattr(synthetic_code, "draw", draw)
    monkeypatch.setattr(synthetic_code, "_ROUND", 40)
    monkeypatch.setattr(synthetic_code, "_IDLE_ROUNDS", 2)
    with pytest.raises(ValueError, match="after 30 documents, none of the last 80"):
        build(num_documents=31)


def test_it_streams_as_a_task(tmp_path):
    synthetic_code.register(
        vocabulary=vocabularies.byte(),
        num_documents=60,
        mutated_share=0.0,
        validation_fraction=0.2,
        cache_dir=tmp_path,
    )
    batch = stream.make_stream(
        mixture_or_task_name="synthetic_code",
        task_feature_lengths={"targets": 256},
        batch_size=4,
        cache_dir=tmp_path,
    ).batch(0, 0, 4)
    text = vocabularies.byte().decode([int(i) for i in batch["decoder_target_tokens"][0]])
    assert "def " in text or "assert" in text or "return" in text
    assert set(tasks.sources()["synthetic_code"].splits) == {"train", "validation"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_documents": 0}, "num_documents = 0"),
        ({"mutated_share": 1.0}, r"mutated_share = 1.0 must be in \[0, 1\)"),
        ({"validation_fraction": -0.1}, "validation_fraction = -0.1"),
    ],
)
def test_settings_out_of_range(build, settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)
