"""The row about code in a checkpoint."""

import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from tests.faults import calls
from tests.faults.hostile import checkpoint
from tests.faults.table import Bench, Case, Row, Silent, Unclear


def _code(seed: int) -> Iterator[Case]:
    del seed
    for name in ("config.json", "tokenizer_config.json"):
        for key in ("auto_map", "custom_pipelines"):
            yield Case(f"{key} in {name}", functools.partial(_remote, name, key))
    for name in ("modeling_own.py", "tokenization_own.py", "conftest.py", "sitecustomize.py"):
        yield Case(f"{name} in the folder", functools.partial(_beside, name))
    for name in ("os.system", "own:model", "step_dir.remove", "jax.numpy.load", "builtins.eval"):
        yield Case(f"model.json calls {name}", functools.partial(_record, name), own_process=True)
    yield Case("config.gin beside a checkpoint calls a function", _gin_beside, own_process=True)


_PROGRAM = "import os; os.mkdir({!r})"


def _remote(name: str, key: str, bench: Bench) -> None:
    folder = checkpoint.write(bench.folder / "hf")
    (folder / "own.py").write_text(_PROGRAM.format(str(bench.folder / "executed")))
    content = json.loads((folder / "config.json").read_text()) if name == "config.json" else {}
    content[key] = {"AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", None]}
    if name != "config.json":
        vocab: Mapping[str, Any] = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
        (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": vocab}))
    (folder / name).write_text(json.dumps(content))
    status, text = calls.call("convert", [f"--from_hf={folder}", f"--to={bench.folder / 'run'}"])
    if status not in (0, 2):
        raise Unclear(f"status {status}: ...{text[-300:]}")
    if status == 0 and key == "auto_map" and name == "config.json":
        raise Silent("a model with code of its own was imported")
    checkpoint.check_not_executed(bench)


def _beside(name: str, bench: Bench) -> None:
    folder = checkpoint.write(bench.folder / "hf")
    (folder / name).write_text(_PROGRAM.format(str(bench.folder / "executed")))
    status, text = calls.call("convert", [f"--from_hf={folder}", f"--to={bench.folder / 'run'}"])
    if status != 0:
        raise Unclear(f"status {status}: ...{text[-300:]}")
    checkpoint.check_not_executed(bench)


def _record(name: str, bench: Bench) -> None:
    from tests.faults import program

    run = program.half_way(bench)
    record = json.loads((run / "model.json").read_text())
    record["macros"]["MODEL"] = {"call": name}
    (run / "model.json").write_text(json.dumps(record))
    _score(bench, run, "model.json")


def _gin_beside(bench: Bench) -> None:
    from tests.faults import program

    run = program.half_way(bench)
    (run / "model.json").unlink()
    path = bench.folder / "executed"
    text = (
        run / "config.gin"
    ).read_text() + "\nfrom espalier.trainers.checkpoints import step_dir\n"
    text += "config.TransformerConfig.sliding_window = @step_dir.write_file()\n"
    text += f"step_dir.write_file.path = '{path}'\nstep_dir.write_file.data = b'x'\n"
    (run / "config.gin").write_text(text)
    _score(bench, run)


def _score(bench: Bench, run: pathlib.Path, *words: str) -> None:
    rows = bench.folder / "rows.jsonl"
    rows.write_text('{"text": "hi"}\n')
    flags = [f"--checkpoint={run}", f"--inputs={rows}", f"--output={bench.folder / 'out.jsonl'}"]
    calls.refused("score", flags, *words)
    checkpoint.check_not_executed(bench)


ROWS = (
    Row(18, "code in a checkpoint", "never executed; refused where it is needed", _code, sample=2),
)
