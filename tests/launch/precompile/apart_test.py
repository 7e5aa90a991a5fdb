"""Compilations in a process of their own: errors are told, and limits of time and memory end it."""

import psutil
import pytest

from espalier.launch.precompile import apart

TINY = [
    "--gin_file=t5x_configs/models/tiny.gin",
    "--gin_file=t5x_configs/runs/pretrain.gin",
    "--gin.BATCH_SIZE=4",
    '--gin.TASK_FEATURE_LENGTHS={"targets": 256}',
]


def test_an_error_of_the_configuration_is_the_outcome():
    outcome = apart.compile_apart([*TINY, "--topology=v5e:four"], apart.Limits(300, 1e11))
    assert outcome.report is None and not outcome.stopped
    assert outcome.problem.startswith("--topology=v5e:four is not a TPU topology")


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        (apart.Limits(0.3, 1e11), "stopped after 0 s, the limit of time"),
        (apart.Limits(300, 1e3), "the limit of memory"),
    ],
)
def test_limits_end_a_compilation(limits, problem):
    seen = []
    outcome = apart.compile_apart([*TINY, "--topology=v5e:2x2"], limits, waiting=seen.append)
    assert outcome.stopped and problem in outcome.problem
    assert seen and outcome.seconds < 60
    assert not [
        child
        for child in psutil.Process().children(recursive=True)
        if "espalier.launch.submit.worker" in child.cmdline()
    ]
