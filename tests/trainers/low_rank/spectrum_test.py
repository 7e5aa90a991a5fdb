"""Which readings of singular values a run has after a resume and after a rollback."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from espalier.trainers.hooks import RunContext
from espalier.trainers.low_rank import spectrum
from espalier.trainers.train_state import TrainState

STATE = TrainState(
    step=jnp.zeros((), jnp.int32), params={"a": {"kernel": jnp.eye(3)}}, opt_state={}
)


def steps_after(path, start, calls):
    """Returns the steps of the file after calls of a process that began at step `start`."""
    program = types.SimpleNamespace(
        abstract_state=jax.eval_shape(lambda: STATE),
        mesh=Mesh(np.array(jax.devices()[:1]), ("data",)),
        recipe=types.SimpleNamespace(inputs_spec=types.SimpleNamespace(unit="tokens")),
    )
    run = RunContext(
        path=path, writer=True, step=start, program=program, learning_rate=lambda step: 0.1
    )
    hook = spectrum.Spectrum(run=run, kernels=("a/kernel",))
    for step in calls:
        hook(step, STATE, {})
    return [line["step"] for line in spectrum.read(path)]


@pytest.mark.parametrize(
    ("start", "calls", "steps"),
    [
        (300, [300], [0, 100, 200, 300]),  # a stop left the hook out at the step of the resume
        (250, [300], [0, 100, 200, 300]),
        (200, [300], [0, 100, 200, 300]),
        (100, [200, 300], [0, 100, 200, 300]),  # 200 is read again
        (0, [0, 100], [0, 100]),  # a new run
        (200, [300, 400, 300], [0, 100, 200, 300]),  # rolled back to a step before 300
        (200, [300, 100, 200], [0, 100, 200]),
    ],
)
def test_a_file_has_the_readings_in_force(tmp_path, start, calls, steps):
    lines = [{"step": step, "learning_rate": 0.1, "layers": {}} for step in (0, 100, 200)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / spectrum.FILE).write_text(text)
    assert steps_after(tmp_path, start, calls) == steps
