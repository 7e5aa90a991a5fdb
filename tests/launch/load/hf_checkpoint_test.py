"""Commands read the directory of a Hugging Face checkpoint as they read the run that `launch.convert` makes of it."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from espalier.launch.evaluate.judges.checkpoint import CheckpointWriter
from espalier.launch.load import hf_checkpoint, load_run
from espalier.launch.load.load import load
from espalier.launch.load.loaded_run import LoadError
from espalier.model.hf import registry
from tests.launch.convert_test import GOLDENS, write_checkpoint
from tests.launch.run.run_vocabulary_test import hf_files


def case_of(name):
    """(golden case of the family, config.json, tensors in float32)."""
    with np.load(GOLDENS / f"{name}.npz") as file:
        case = dict(file)
    tensors = {
        name.partition("/")[2]: value.astype(np.float32)
        for name, value in case.items()
        if name.startswith("tensor/")
    }
    return case, json.loads(str(case["config"])), tensors


@pytest.mark.parametrize("name", ["gpt2_0", "mixtral_0"])
def test_log_probabilities_are_those_of_transformers(name, tmp_path, capsys):
    case, config, tensors = case_of(name)
    write_checkpoint(tmp_path / "hf", config, tensors)
    run = load(tmp_path / "hf", mesh={"data": -1})
    assert not run.model.config.scan_layers
    tokens, expected = case["tokens/0"], case["logprobs/0"]
    logits_TV = np.asarray(run.logits(tokens[None]), np.float64)[0]
    found = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    np.testing.assert_allclose(found, expected, atol=1e-4)  # float32 of two libraries
    assert "has no tokenizer" in capsys.readouterr().err
    with pytest.raises(LoadError, match="sets no VOCABULARY"):
        run.encode("text")


def test_a_folder_whose_files_were_replaced_is_read_again(llama, tmp_path):
    """One process may load what it has exported anew."""
    folder = tmp_path / "again"
    shutil.copytree(llama, folder)
    assert load(folder).model.config == load(folder).model.config
    first = hf_checkpoint.recorded(str(folder))
    assert hf_checkpoint.recorded(str(folder)) is first
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    replaced = hf_checkpoint.recorded(str(folder))
    texts = [pathlib.Path(path, "model.json").read_text() for path, _ in (first, replaced)]
    assert "0.5" in texts[1] and texts[0] != texts[1]


def write_llama(folder, *, seed=0):
    """Writes a checkpoint with a tokenizer, in float32, and returns its folder."""
    config = {**case_of("llama_0")[1], "vocab_size": 320, "torch_dtype": "float32"}
    config |= {"dtype": "float32", "eos_token_id": [257, 259]}
    family = registry.family_of_config(config)
    rng = np.random.default_rng(seed)
    shapes = family.shapes(family.model(config))
    tensors = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    write_checkpoint(folder, config, tensors)
    made = hf_files(folder.parent / f"{folder.name}_tokenizer", config=config)
    for file in made.iterdir():
        file.rename(folder / file.name)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama") / "hf")


def test_commands_read_it_as_the_run_of_an_import(llama, command, tmp_path):
    assert command("convert", f"--from_hf={llama}", f"--to={tmp_path}/run") == 0
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "import os"}\n{"messages": [{"role": "user", "content": "hi"}]}\n')
    found = {}
    for checkpoint in (llama, tmp_path / "run"):
        out = {name: tmp_path / f"{name}.jsonl" for name in ("generate", "score")}
        files = (f"--checkpoint={checkpoint}", f"--inputs={rows}")
        new = ("--max_new_tokens=4", "--temperature=0")
        assert command("generate", *files, f"--output={out['generate']}", *new) == 0
        assert command("score", *files, f"--output={out['score']}") == 0
        found[checkpoint] = [
            [json.loads(line) for line in path.read_text().splitlines()] for path in out.values()
        ]
    direct, imported = found.values()
    for here, there in zip(direct, imported, strict=True):
        for row, same in zip(here, there, strict=True):
            # Loops over stacked layers and unrolled ones are compiled differently.
            np.testing.assert_allclose(row.pop("logprobs"), same.pop("logprobs"), atol=1e-5)
            if "logprob" in row:
                np.testing.assert_allclose(row.pop("logprob"), same.pop("logprob"), rtol=1e-5)
            assert row == same


def test_influence_reads_it_for_documents_and_for_queries(llama, command, tmp_path, capsys):
    (tmp_path / "d.jsonl").write_text('{"text": "import os"}\n{"tokens": [5, 6, 7]}\n')
    (tmp_path / "q.jsonl").write_text('{"prompt": "import ", "completion": "os"}\n')
    files = (f"--documents={tmp_path}/d.jsonl", "--batch_size=8")
    made = f"{tmp_path}/factors"
    assert command("influence fit", f"--checkpoint={llama}", *files, f"--out={made}") == 0
    given = (f"--factors={made}", *files, f"--queries={tmp_path}/q.jsonl")
    rows = {}
    for name, flags in (("own", ()), ("other", (f"--query_checkpoint={llama}",))):
        out = tmp_path / f"{name}.jsonl"
        assert command("influence score", *given, f"--out={out}", *flags) == 0
        rows[name] = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows["own"] == rows["other"] and np.abs(rows["own"][0]["scores"][0]) > 0
    # The layers of a run are stacked.
    assert command("convert", f"--from_hf={llama}", f"--to={tmp_path}/run") == 0
    capsys.readouterr()
    flags = (f"--out={tmp_path}/x.jsonl", f"--query_checkpoint={tmp_path}/run")
    assert command("influence score", *given, *flags) == 2
    assert "import it with espalier convert" in capsys.readouterr().err


def test_held_out_loss_is_that_of_the_run(llama, command, trained_run, tmp_path, capsys):
    assert command("convert", f"--from={trained_run.path}", f"--to_hf={tmp_path}/hf") == 0
    settings = f"--gin_file={trained_run.path}/config.gin"
    losses = {}
    for name, flags in {
        "run": (f"--checkpoint={trained_run.path}", "--trust_config"),
        "hf": (f"--checkpoint={tmp_path}/hf", settings),
    }.items():
        report = tmp_path / f"{name}.json"
        cache = f"--gin.stream.make_eval_stream.cache_dir={tmp_path}/cache"
        assert command("evaluate loss", *flags, cache, f"--json={report}") == 0
        losses[name] = json.loads(report.read_text())["tasks"]["files"]["loss"]
    assert losses["hf"] == pytest.approx(losses["run"], rel=1e-5)
    capsys.readouterr()
    assert command("evaluate loss", f"--checkpoint={llama}", "--trust_config") == 2
    assert "describes no data: give those of a run" in capsys.readouterr().err


def _judge(checkpoint):
    configuration = load_run.configuration_of(str(checkpoint))
    options = {"settings": configuration.text, "checkpoint": str(checkpoint), "max_tokens": 2}
    return CheckpointWriter(configuration.entry(), **options)


def test_a_judge_knows_its_weights_and_settings_by_their_content(llama, tmp_path):
    """The folder of the record, which each process names anew, is no part of its identity."""
    identities = []
    for _ in range(2):
        hf_checkpoint._recorded.cache_clear()
        judge = _judge(llama)
        identities.append(judge.identity)
    assert identities[0] == identities[1] and judge.name == f"checkpoint:{llama}"
    ((index, reply),) = judge.write(["a"], temperature=0.0, seed=0)
    assert index == 0 and isinstance(reply, str)
    shutil.copytree(llama, tmp_path / "hf")
    weights = tmp_path / "hf" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    other = _judge(tmp_path / "hf")
    assert {n for n in other.identity if other.identity[n] != judge.identity[n]} >= {"weights"}


def test_what_it_lacks_is_one_error(llama, command, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "import os"}\n')
    files = (f"--inputs={rows}", f"--output={tmp_path}/out.jsonl")
    for flags, words in (
        (("--params=ema",), "without a moving average: remove --params=ema"),
        (("--adapter=/none",), "belongs to a run: import it with espalier convert"),
        (("--gin.transformer.Transformer.tie_embeddings=None",), "tie_embeddings"),
    ):
        assert command("score", f"--checkpoint={llama}", *files, *flags) != 0
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error
    (tmp_path / "hf").mkdir()
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert command("score", f"--checkpoint={tmp_path}/hf", *files) != 0
    assert "has no weights: give a directory with model.safetensors" in capsys.readouterr().err
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "mamba"}')
    assert command("score", f"--checkpoint={tmp_path}/hf", *files) != 0
    error = capsys.readouterr().err
    assert "mamba" in error and "Traceback" not in error
