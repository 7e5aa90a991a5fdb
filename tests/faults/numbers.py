"""Rows about numbers: NaN, infinities and spikes in losses, gradients and updates, under each policy."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from espalier.launch import cli
from tests.faults import program
from tests.faults.table import Bench, Case, Lost, Row, Silent, Unclear

_W = np.array([[1.0, -2.0], [0.5, 3.0], [2.0, 0.0]], np.float32)
_ACTIONS = ("stop", "skip", "rollback")
_WINDOW, _LENGTH = 8, 20  # good steps before spikes are judged, and steps of a trajectory


def _batch(seed: int, *, on: bool = False) -> dict[str, np.ndarray]:
    random_ = np.random.default_rng(seed)
    x = random_.normal(size=(8, 3)).astype(np.float32)
    return {"x": x, "y": x @ _W, "on": np.full((8,), on)}


@functools.cache
def _step(kind: str) -> tuple[Callable[..., Any], Any]:
    """Returns a compiled step of least squares that a batch can spoil, and the state it starts from."""
    import jax
    import jax.numpy as jnp
    import optax

    from espalier.trainers.anomaly import STATISTICS, Anomaly
    from espalier.trainers.objectives.base import LossOut
    from espalier.trainers.step import make_train_step
    from espalier.trainers.train_state import TrainState
    from tests.faults.poison import spoilt

    def loss_fn(params: Any, batch: Any, rng: Any) -> LossOut:
        del rng
        error = ((batch["x"] @ params["w"] - batch["y"]) ** 2).sum()
        total = spoilt(error, batch["on"][0], kind)
        return LossOut(sum=total, weight=jnp.float32(8), metrics={"loss": (total, jnp.float32(8))})

    optimizer = optax.adamw(1e-3)
    anomaly = Anomaly(action="skip", spike_sigmas=8.0 if kind == "spike" else None, window=_WINDOW)
    params = {"w": jnp.zeros((3, 2))}
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema_params=None,
        variables={STATISTICS: anomaly.init()},
    )
    step = make_train_step(loss_fn=loss_fn, optimizer=optimizer, extensions=[anomaly])
    return jax.jit(step), state


def _trajectories(kinds: tuple[str, ...], number: int) -> Iterator[Case]:
    for kind in kinds:
        for index in range(number):
            name = f"{kind} in random batches of least squares, {index}"
            yield Case(name, functools.partial(_skips, kind, name))


def _skips(kind: str, name: str, bench: Bench) -> None:
    """Compares the state after a bad batch with the state before, and the last with that of good batches only."""
    import jax

    choice = bench.random(name)
    bad = {choice.randrange(_WINDOW + 1, _LENGTH) for _ in range(3)}
    step, state = _step(kind)
    oracle = state
    for number in range(_LENGTH):
        before = state
        state, metrics = step(state, _batch(number, on=number in bad))
        if bool(metrics["anomaly"][0]) != (number in bad):
            raise Silent(
                f"batch {number} was judged {metrics['anomaly'][0]}; bad are {sorted(bad)}"
            )
        if number in bad:
            _check_equal(before, state, f"batch {number}")
        else:
            oracle, _ = step(oracle, _batch(number))
    _check_equal(oracle, state, "the end")
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(state.params)):
        raise Silent("parameters are not finite")


def _check_equal(one: Any, other: Any, where: str) -> None:
    import jax

    for part in ("params", "opt_state", "variables"):
        leaves = map(jax.tree.leaves, (getattr(one, part), getattr(other, part)))
        if not all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True)):
            raise Silent(f"{where}: {part} differ from those without the bad batches")


def _runs(kinds: tuple[str, ...]) -> Iterator[Case]:
    for kind in kinds:
        for action in _ACTIONS:
            act = functools.partial(_run, kind, action)
            yield Case(f"{kind} in a run that has action {action}", act, 2400, own_process=True)


def _run(kind: str, action: str, bench: Bench) -> None:
    """Trains on spoilt batches, which are recorded and dropped, or end the run with one error."""
    run, gin = bench.folder / "run", bench.folder / "poison.gin"
    gin.write_text(
        "from __gin__ import dynamic_registration\n"
        "from tests.faults import poison\nfrom espalier.trainers import recipe\n"
        "recipe.Recipe.objective = @poison.objective\n"
        f"poison.objective.kind = '{kind}'\npoison.objective.every = 6\n"
    )
    bindings = [f"anomaly.Anomaly.action='{action}'", "TRAIN_STEPS=24", "LOG_PERIOD=1"]
    bindings += ["schedules.cosine.total_steps=24"]
    if kind == "spike":
        bindings += ["anomaly.Anomaly.spike_sigmas=8.0", "anomaly.Anomaly.window=4"]
    flags = program.train_flags(bench, run, *bindings)
    flags.insert(3, f"--gin_file={gin}")
    process = program.start(bench, "train", flags)
    status = process.wait()
    if "Traceback" in process.text or status not in (0, cli.USAGE_ERROR):
        raise Unclear(f"status {status}: ...{process.text[-600:]}")
    records = list((run / "anomalies").glob("batch_*.json"))
    if not records:
        raise Silent("no bad batch is recorded")
    if status != 0 and action == "skip":
        raise Lost(f"a run that skips bad batches has ended: ...{process.text[-600:]}")
    if status == 0 and action == "stop":
        raise Silent("a run that stops at a bad batch has gone on")
    losses = [row["loss"] for row in program.rows(run).values() if "loss" in row]
    good = [x for x in losses if isinstance(x, float) and np.isfinite(x)]
    if not good or not np.isfinite(good[-1]):
        raise Silent("the last loss is not finite")


ROWS = (
    Row(
        9,
        "NaN or infinity in loss or gradient",
        "stopped, skipped or rolled back as set, and recorded; the state stays bit-equal",
        lambda seed: [
            *_trajectories(("nan", "inf", "gradient"), 4),
            *_runs(("nan", "inf", "gradient")),
        ],
        sample=2,
    ),
    Row(
        10,
        "a loss that is 50 times as large",
        "the trajectory is that without the bad batches",
        lambda seed: [*_trajectories(("spike",), 10), *_runs(("spike",))],
        sample=2,
    ),
)
