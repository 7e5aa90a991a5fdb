"""Compiles the toy programs whose text the parser tests read; run when the compiler's text changes.

  python tests/launch/goldens/make_hlo.py      (needs the extra `tpu`)

Each program multiplies known shapes a known number of times; tests/launch/precompile/hlo_test.py holds the
closed forms. What the parser never looks at (source positions, cost estimates) is cut from the text.
"""

import os
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent

if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[2]))
    from espalier.launch.precompile import tpu_topology

    tpu_topology.prepare_environment()
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import pallas  # noqa: E402
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec  # noqa: E402

LAYERS, ROWS, WIDTH, CHIPS = 6, 128, 256, 4


def mesh_of(devices) -> Mesh:
    return jax.make_mesh((len(devices),), ("fsdp",), axis_types=(AxisType.Auto,), devices=devices)


def scanned_layers(mesh: Mesh):
    """Gradients of `LAYERS` rematerialised products x @ w, w sharded over its rows (FSDP)."""

    def loss(weights_LDD, x_BD):
        @jax.checkpoint
        def layer(x_BD, w_DD):
            return jnp.tanh(x_BD @ w_DD), None

        return jax.lax.scan(layer, x_BD, weights_LDD)[0].astype(jnp.float32).sum()

    def shaped(shape, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    weights = shaped((LAYERS, WIDTH, WIDTH), None, "fsdp")
    x = shaped((CHIPS * ROWS, WIDTH), "fsdp")
    return jax.jit(jax.grad(loss), out_shardings=weights.sharding).lower(weights, x)


def windowed_product(mesh: Mesh):
    """x @ w in bfloat16, large enough that the gather of w becomes a loop of permutes and products."""

    def shaped(shape, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    x = shaped((16 * 2048, 4096), "fsdp")
    w = shaped((4096, 4096), "fsdp")
    return jax.jit(jnp.matmul, out_shardings=x.sharding).lower(x, w)


def kernel_in_a_loop(mesh: Mesh):
    """One Pallas kernel, called in a loop of 3, whose metadata spans several lines."""

    def double(x_ref, o_ref):
        o_ref[...] = x_ref[...] * 2

    def program(x):
        call = pallas.pallas_call(
            double,
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            name="double_kernel",
            metadata={"rows": "128", "note": "two\nlines"},
        )
        return jax.lax.fori_loop(0, 3, lambda _, x: call(x), x)

    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.jit(program).lower(
        jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=sharding)
    )


def without_noise(text: str) -> str:
    """Drops tables of source positions, operation names and the compiler's own estimates."""
    text = re.sub(r"\n(FileNames|FunctionNames|FileLocations|StackFrames)\n(.+\n)*", "\n", text)
    text = re.sub(r', metadata=\{(?:[^{}"]|"[^"]*")*\}', "", text)
    text = re.sub(r', backend_config=(?!\{"known)\{.*?\}(?=\n|, \w+=)', "", text)
    return re.sub(r"\n\n+", "\n\n", text)


def main() -> None:
    tpu = mesh_of(tpu_topology.devices(tpu_topology.parse("v5e:2x2")))
    sixteen = mesh_of(tpu_topology.devices(tpu_topology.parse("v5e:4x4")))
    one = mesh_of(tpu_topology.devices(tpu_topology.parse("v5e:1x1")))
    cpu = mesh_of(jax.devices())
    programs = {
        "scanned_layers_v5e": scanned_layers(tpu),
        "scanned_layers_cpu": scanned_layers(cpu),
        "windowed_product_v5e": windowed_product(sixteen),
        "kernel_v5e": kernel_in_a_loop(one),
    }
    for name, lowered in programs.items():
        text = without_noise(lowered.compile().as_text())
        (HERE / f"{name}.hlo").write_text(text)
        print(f"{name}: {len(text)} characters")


if __name__ == "__main__":
    main()
