"""The row about paths that leave a checkpoint, links, devices and odd names."""

import functools
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from tests.faults import calls
from tests.faults.hostile import checkpoint
from tests.faults.table import Bench, Case, Row, Silent, Unclear

_OUTSIDE = (
    "../secret.safetensors",
    "/etc/hostname",
    "a/../../secret.safetensors",
    "x" * 5000,
    "\ud800",
)
_OUTSIDE += ("x\0y", ".", "..", "", "loop", "link", "/dev/zero", "fifo", "folder")


def _paths(seed: int) -> Iterator[Case]:
    del seed
    for number, name in enumerate(_OUTSIDE):
        act = functools.partial(_index, name)
        yield Case(f"an index that names {name[:30]!r}, {number}", act)
    names = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
    names += ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
    for name in names:
        for target in ("../secret", "/dev/zero", "/etc/hostname"):
            act = functools.partial(_link, name, target)
            yield Case(f"{name} is a link to {target}", act)
    for name in ("-1", "1e3", "8.aside", "../8", "08x", "٣"):
        yield Case(
            f"a step of the name {name!r}", functools.partial(_step_name, name), own_process=True
        )


def _index(name: str, bench: Bench) -> None:
    folder = checkpoint.write(bench.folder / "hf")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (bench.folder / "secret.safetensors").write_bytes(content)
    (folder / "a").mkdir()
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "link").symlink_to("../secret.safetensors")
    os.mkfifo(folder / "fifo")
    index = {"metadata": {}, "weight_map": dict.fromkeys(checkpoint.tensors(), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint.check_refused(bench, folder)


def _link(name: str, target: str, bench: Bench) -> None:
    folder = checkpoint.write(bench.folder / "hf")
    (bench.folder / "secret").write_text('{"secret": "7c1d"}')  # pragma: allowlist secret
    if name not in ("tokenizer.json", "config.json", "model.safetensors"):
        vocab: Mapping[str, Any] = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
        (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": vocab}))
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    status, text = calls.call("convert", [f"--from_hf={folder}", f"--to={bench.folder / 'run'}"])
    if status == 0:
        copies = [p for p in (bench.folder / "run").rglob(name) if p.is_file()]
        if copies:
            raise Silent(f"{name} was copied from outside of the checkpoint")
        return  # the file is not read at all
    if status != 2 or "error: " not in text:
        raise Unclear(f"status {status}: ...{text[-300:]}")


def _step_name(name: str, bench: Bench) -> None:
    """Puts a folder of an odd name beside the steps, which must not be read or deleted."""
    from etils import epath

    from espalier.trainers.checkpoints import step_dir
    from tests.faults import program

    run = program.half_way(bench)
    folder = run / "checkpoints" / name
    folder.mkdir(exist_ok=True)
    (folder / "mine").write_text("x")
    steps = step_dir.complete_steps(epath.Path(run) / "checkpoints")
    if max(steps) != 8 or not (folder / "mine").exists():
        raise Silent(f"steps are {sorted(steps)}")


ROWS = (
    Row(
        17,
        "paths that leave a checkpoint, links, devices, odd names",
        "refused or not read",
        _paths,
        sample=3,
    ),
)
