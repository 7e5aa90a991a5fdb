"""Time of a training step of the language experiment's models, dense and factorised, in turns."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from launch.papers.low_rank import sweep as lm

ROUNDS, STEPS = 15, 20
SEED = 0


# Arms whose factors are smaller than every matrix they replace; at a rank of 0.62 of the smaller side those of square
# matrices are larger.
SMALLER = (lm.ratio_arm("full"), lm.arm("spectral", min(lm.RANKS)))


def arms() -> dict[str, dict[str, Any]]:
    """Returns gin files and bindings of the arms that differ in size, by name."""
    named = lm.get_config("1").arms
    return {
        name: {key: list(named[name][key]) for key in ("gin_files", "bindings")}
        for name in ("dense", lm.arm("spectral"), *SMALLER)
    }


SETTINGS = {"rounds": ROUNDS, "steps": STEPS, "arms": arms()}


def measure() -> dict[str, Any]:
    """Returns the seconds of a step by arm and round, the median of `STEPS`: {'seconds': {arm: [...]}}.

    All are compiled before the first round. Every arm has its turn in a round, so that ratios within a round compare
    the same moment.
    """
    sides = {name: _Side.of(settings) for name, settings in arms().items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, side in sides.items():
            seconds[name].append(side.median(STEPS))
    return {"seconds": seconds}


def ratios(measured: Mapping[str, Any], arm: str, base: str = "dense") -> np.ndarray:
    """Returns an arm's time over another's, round by round."""
    return np.array(measured["seconds"][arm]) / np.array(measured["seconds"][base])


@dataclasses.dataclass
class _Side:
    """A compiled step and the state that it goes on with."""

    step: Callable[[Any, Any], tuple[Any, Any]]
    state: Any
    batch: Any

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "_Side":
        import jax

        from launch.config import gin_config
        from trainers import partitioning

        bindings = (*settings["bindings"], "MODEL_DIR=''")
        config = gin_config.load(settings["gin_files"], bindings, entry="launch.train:train")
        recipe = config.arguments()["recipe"]
        program = recipe.program()
        batch = _batch(recipe, program)
        with partitioning.use_mesh(program.mesh, program.rules):
            state = program.init()
            step = program.steps(1).train.lower(state, batch).compile()
            state, _ = step(state, batch)
        return cls(step, jax.block_until_ready(state), batch)

    def median(self, steps: int) -> float:
        """Returns the median time of so many steps, each run to its end."""
        import jax

        taken = []
        for _ in range(steps):
            began = time.perf_counter()
            self.state, _ = self.step(self.state, self.batch)
            jax.block_until_ready(self.state)
            taken.append(time.perf_counter() - began)
        return float(np.median(taken))


def _batch(recipe: Any, program: Any) -> dict[str, Any]:
    """Returns rows of one document each: random tokens, all with a loss."""
    import jax

    draw = np.random.default_rng(SEED)
    rows = (recipe.batch_size, recipe.length)
    tokens = draw.integers(3, recipe.model.config.vocab_size, size=rows).astype(np.int32)
    arrays = {
        "decoder_input_tokens": tokens,
        "decoder_target_tokens": np.roll(tokens, -1, axis=1),
        "decoder_loss_weights": np.ones(rows, np.float32),
        "decoder_segment_ids": np.ones(rows, np.int32),
        "decoder_positions": np.broadcast_to(np.arange(rows[1], dtype=np.int32), rows),
        "source_ids": np.zeros(rows[0], np.int32),
    }
    return {name: jax.device_put(array, program.batch_sharding) for name, array in arrays.items()}
