"""The matrix products of a training step alone, as one program, beside the whole step: a bound of the step's time.

The steps are those of `train_step`, of `adapters` against peft (LoRA), and of `t5`, with random tokens. The products have
the shapes, dtypes and number of those in the step, forward and backward, without those whose result nothing uses. Products of
equal shapes read the same operands, which caches keep, and nothing else is computed: a step takes no less time.
"""

import collections
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval

from tests.benchmarks import adapters, case, compare, t5
from tests.benchmarks.jax import llama_jax, t5_jax
from tests.benchmarks.step_side import StepSide

_TINY = {"batch_size": 1, "length": 64, "inputs": 64, "targets": 16}


class _Examples:
    """A stream of random inputs and targets."""

    source_names = ("random",)

    def __init__(self, sizes: Mapping[str, Any]):
        self.batch_size, self._sizes = sizes["batch_size"], sizes

    def batch(self, step: int, lo: int, hi: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((step, lo))
        shapes = [(hi - lo, self._sizes[name]) for name in ("inputs", "targets")]
        size = self._sizes["vocab_size"]
        return t5_jax.batch_of(*(rng.integers(2, size, shape, np.int32) for shape in shapes))


def run(*, repeats: int = 12, tiny: bool = False) -> dict[str, Any]:
    """Alternates a step and its products `repeats` times, for each of the three steps."""
    llama, pairs = ({**sizes, **(_TINY if tiny else {})} for sizes in (case.CASE, t5.CASE))
    lora = {**llama, "lora_rank": adapters.PEER_RANK}
    sides: dict[str, Callable[[], StepSide]] = {
        "train_step": lambda: StepSide(llama_jax.recipe_of(llama)),
        "lora": lambda: StepSide(llama_jax.recipe_of(lora)),
        "t5": lambda: StepSide(t5_jax.recipe_of(pairs), _Examples(pairs)),
    }
    return {name: _compare(side(), repeats) for name, side in sides.items()}


def _compare(side: StepSide, repeats: int) -> dict[str, Any]:
    counts = products_of(side.jaxpr)
    calls = {"step": side.step, "products": _timed(counts)}
    times = compare.alternate(calls, repeats, warm_up=1)
    return {
        "products_over_step": compare.ratio(times["products"], times["step"]),
        "seconds": {name: sorted(values)[repeats // 2] for name, values in times.items()},
        "products": counts.total(),
    }


def products_of(jaxpr: Any) -> collections.Counter:
    """Returns how often a program computes each product of matrices: its operands' shapes with dtypes, and its parameters.

    Raises:
      ValueError: a product is in a branch or in a loop of unknown length.
    """
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _counted(used)


def _counted(jaxpr: Any) -> collections.Counter:
    counts: collections.Counter = collections.Counter()
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        operands = [variable.aval for variable in equation.invars]
        if name == "dot_general" and _of_matrices(*operands, **params):
            shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands)
            counts[(*shapes, tuple(sorted(params.items())))] += 1
        for inner in jaxprs_in_params(params):
            own = _counted(inner)
            if own and name in ("cond", "while"):
                raise ValueError(f"Products in a {name!r} cannot be counted.")
            for product, count in own.items():
                counts[product] += count * (params["length"] if name == "scan" else 1)
    return counts


def _of_matrices(x: Any, y: Any, *, dimension_numbers: Any, **_: Any) -> bool:
    """Returns whether both operands have an axis of the result of their own: XLA fuses other products with what is around them."""
    contracted, batch = ([len(axes) for axes in each] for each in dimension_numbers)
    return x.ndim > contracted[0] + batch[0] and y.ndim > contracted[1] + batch[1]


def _timed(counts: collections.Counter) -> Callable[[], float]:
    """Returns a function that computes all products once and returns its time in seconds."""
    rng = np.random.default_rng(0)
    operands = [
        [jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in shapes] for *shapes, _ in counts
    ]

    def program(operands: Any) -> jax.Array:
        total = jnp.float32(0)
        for (*_, params), count, (x, y) in zip(counts, counts.values(), operands, strict=True):

            def once(_: Any, total: jax.Array, x=x, y=y, params=params) -> jax.Array:
                # The barriers keep XLA from computing only once, or only the element that is used.
                x, y, total = jax.lax.optimization_barrier((x, y, total))
                product = jax.lax.dot_general_p.bind(x, y, **dict(params))
                product = jax.lax.optimization_barrier(product)
                return total + product.ravel()[0].astype(jnp.float32)

            total = jax.lax.fori_loop(0, count, once, total)
        return total

    compiled = jax.jit(program).lower(operands).compile()

    def call() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(compiled(operands))
        return time.perf_counter() - begin

    return call
