"""A run that two processes began goes on in one, on another mesh and rule set, with the same numbers."""

import contextlib
import json
import pathlib
import subprocess
import sys

import pytest

from tests.launch.resume_test import rows
from tests.processes import free_port, with_devices

ROOT = pathlib.Path(__file__).parents[2]

# Two sources; their shares change between the stop and the end, so that what the second part reads
# depends on what the first has dealt.
PHASES = "((0, {'licence': 0.75, 'code': 0.25}), (8, {'licence': 0.25, 'code': 0.75}))"
STOP, END = 12, 24


def flags(train, path, *bindings):
    given = (
        f"MODEL_DIR={str(path)!r}",
        f"DIRECTORY={train.cache + '/text'!r}",
        f"local_text.open_stream.phases={PHASES}",
        "train.train.eval_tasks=None",
        "EVAL_PERIOD=6",
        "LENGTH=32",
        "recipe.Recipe.mesh={'fsdp': -1}",
        *bindings,
    )
    return [
        f"--gin_file={train.programs}/small_text.gin",
        *(f"--gin.{binding}" for binding in given),
    ]


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory):
    """All steps in one process of eight devices."""
    path = tmp_path_factory.mktemp("uninterrupted")
    result = train(*flags(train, path))
    assert result.status == 0, result.err
    return rows(path)


@pytest.fixture(scope="module")
def begun(train, tmp_path_factory):
    """A run that two processes of one device each have taken to step STOP."""
    path = tmp_path_factory.mktemp("begun")
    address = f"127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as stack:
        processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "espalier.launch.train"),
                    *flags(train, path, f"TRAIN_STEPS={STOP}"),
                    f"--coordinator_address={address}",
                    "--process_count=2",
                    f"--process_index={index}",
                ],
                cwd=ROOT,
                env=with_devices(1),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(2)
        ]
        for process in processes:
            stack.callback(process.kill)
        results = [process.communicate(timeout=180) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    reported = [f"done at step {STOP}" in out for out, _ in results]
    assert reported == [True, False]  # process 0 reports for both
    assert json.loads((path / "run.json").read_text())["mesh"]["processes"] == 2
    assert max(rows(path)) == STOP
    return path


@pytest.mark.multiprocess
def test_one_process_on_another_mesh_ends_what_two_began_with_the_same_numbers(
    train, uninterrupted, begun
):
    mesh = "recipe.Recipe.mesh={'data': 2, 'fsdp': 2, 'tensor': 2}"
    result = train(*flags(train, begun, mesh, "recipe.Recipe.rules='fsdp_tp'"))
    assert result.status == 0, result.err
    assert f"step {STOP} from {begun}" in result.out
    facts = json.loads((begun / "run.json").read_text())
    axes = {"data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    assert facts["mesh"]["axes"] == axes
    assert (facts["mesh"]["processes"], facts["earlier"][-1]["mesh"]["processes"]) == (1, 2)

    found = rows(begun)
    assert list(found) == list(uninterrupted) == [1, *range(2, END + 1, 2)]
    for step, row in uninterrupted.items():
        assert found[step].keys() == row.keys()
        # Sums over other numbers of devices are added in another order.
        assert found[step] == pytest.approx(row, rel=1e-5), step
    for step in (6, STOP, 18, END):
        assert {"eval/licence/loss", "eval/code/loss"} <= found[step].keys()
    sources = {"source_loss/licence", "source_loss/code"}
    assert sources <= found[STOP].keys() & found[END].keys()
    # The comparison is of a model that learns, not of one that stands still.
    assert found[END]["eval/code/loss"] < found[6]["eval/code/loss"] - 0.1
