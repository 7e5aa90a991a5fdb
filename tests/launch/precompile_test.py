"""Compiled costs of train steps: budgets per rule set, FLOPs in closed form, and the command itself.

What compiles for TPUs needs libtpu (the extra `tpu`) and is skipped without it.
"""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys

import jax
import pytest

from espalier.launch import environment
from espalier.launch.config import gin_config
from espalier.launch.precompile import compile_report, precompile, programs, tpu_topology
from espalier.launch.precompile.__main__ import RECIPE, UNREAD
from espalier.launch.precompile.hlo.analysis import Kernel
from espalier.launch.precompile.hlo.text import Array
from espalier.model import attention, config, norm, rope, transformer
from espalier.trainers.objectives import lm
from espalier.trainers.optim import optimizers, schedules
from espalier.trainers.recipe import Recipe

needs_libtpu = pytest.mark.skipif(
    bool(tpu_topology.missing()), reason=tpu_topology.missing() or "libtpu is here"
)

# Simulated CPU mesh: always runs.

ROWS, LENGTH = 8, 64
V, L, D, N, F = 512, 3, 128, 4, 256
KERNELS = L * (4 * D * D + 3 * D * F)
PARAMS = 2 * V * D + KERNELS + (2 * L + 1) * D
STATE_BYTES = 12 * PARAMS  # float32 parameters and two moments

# rule set: mesh, parts of the state, most bytes that a device sends in a step (in units of the
# parameters' bytes), most bytes of temporaries. Measured on jax 0.10.2 and 0.12.0 plus 5 %.
BUDGETS = {
    "dp": ({"data": 8}, 1, 1.76, 5.3e6),
    "fsdp": ({"fsdp": 8}, 8, 3.22, 2.35e6),
    "tp": ({"tensor": 4}, 4, 4.31, 5.5e6),
    "fsdp_tp": ({"fsdp": 4, "tensor": 2}, 8, 2.26, 2.35e6),
    "fsdp_tp_sp": ({"fsdp": 4, "tensor": 2}, 8, 2.99, 2.15e6),
}


def plain_llama():
    """Forms that XLA splits by itself, as on accelerators: what is tested is the partitioning."""
    return transformer.Transformer(
        config=config.TransformerConfig(
            vocab_size=V, num_layers=L, embed_dim=D, num_heads=N, mlp_dim=F, remat="full"
        ),
        tie_embeddings=False,
        block=functools.partial(
            transformer.Block,
            attention=functools.partial(attention.Attention, implementation="xla"),
        ),
    )


def recipe(model, *, mesh, rules, rows, length, implementation="auto"):
    return Recipe(
        model=model,
        batch_size=rows,
        feature_lengths={"targets": length},
        optimizer=optimizers.adamw,
        learning_rate=schedules.constant(peak=1e-3),
        objective=functools.partial(lm.language_modelling, implementation=implementation),
        mesh=mesh,
        rules=rules,
        anomaly=None,
    )


def compiled(run, devices, hbm_bytes=1e12):
    # As started from the command line, without the tests' exact products.
    with jax.default_matmul_precision("default"), jax.numpy_rank_promotion("allow"):
        program = run.program(devices=devices)
        return precompile.compile_work(programs.train(program), program, hbm_bytes=hbm_bytes)[0]


@pytest.fixture(scope="module", params=BUDGETS)
def rule_set(request):
    mesh, parts, sent, temporaries = BUDGETS[request.param]
    devices = jax.devices()[: 4 if request.param == "tp" else 8]
    run = recipe(
        plain_llama(),
        mesh=mesh,
        rules=request.param,
        rows=ROWS,
        length=LENGTH,
        implementation="onehot",
    )
    return request.param, compiled(run, devices), len(devices), parts, sent, temporaries


def test_rule_sets_keep_their_budgets(rule_set):
    name, report, chips, parts, most_sent, most_temporaries = rule_set
    memory, found = report.memory, report.collectives
    # Norm gains are replicated, and the batch is small.
    assert STATE_BYTES / parts <= memory.arguments <= 1.02 * STATE_BYTES / parts
    assert memory.aliased >= STATE_BYTES / parts  # the state is donated
    assert memory.temporaries <= most_temporaries
    sent = sum(total.bytes for total in found.values()) / (4 * PARAMS)
    assert 0.85 * most_sent <= sent <= most_sent
    if name in ("dp", "tp"):
        assert set(found) == {"all-reduce"}
    else:
        assert {"all-gather", "all-reduce"} <= set(found)
    if name == "dp":
        # Every gradient once: a ring sends it twice, less the part that is already there.
        assert sent == pytest.approx(2 * (chips - 1) / chips, rel=1e-3)


def test_products_in_closed_form_under_every_rule_set(rule_set):
    _, report, chips, *_ = rule_set
    tokens = ROWS * LENGTH
    # Forward, recomputed forward and two products backward; the last product of a block need not be
    # computed again, nor the logits.
    kernels = 4 * KERNELS - L * D * F + 3 * V * D
    # XLA's plain attention multiplies whole squares: 2 products forward, again, and 4 backward.
    squares = L * 8 * ROWS * LENGTH * LENGTH * D
    assert report.flops.products * chips == 2 * tokens * kernels + 2 * squares
    model = 3 * tokens * (2 * (KERNELS + V * D) + L * 4 * (LENGTH + 1) / 2 * D)
    assert report.flops.analytic * chips == pytest.approx(model)
    assert report.flops.kernels == 0


# Absent TPUs.

# name: mesh, rule set, most bytes of arguments and temporaries, most bytes at the peak, most bytes
# sent. Measured on jax 0.10.2 and 0.12.0 (libtpu 0.0.42.1 and 0.0.52), the larger plus 5 %.
TPU_BUDGETS = {
    "llama": ({"fsdp": 4}, "fsdp", 16.7e6, 27.3e6, 15.5e6),
    "cohere": ({"fsdp": 2, "tensor": 2}, "fsdp_tp", 115.3e6, 251e6, 67.1e6),
}


def tpu_model(name):
    sizes = dict(num_layers=4, embed_dim=256, num_heads=4, head_dim=64, mlp_dim=512)
    sizes.update(dtype="bfloat16", remat="full")
    if name == "llama":
        return transformer.Transformer(
            config=config.TransformerConfig(vocab_size=1024, **sizes), tie_embeddings=False
        )
    return transformer.Transformer(
        config=config.TransformerConfig(vocab_size=98304, num_kv_heads=2, **sizes),
        block=functools.partial(
            transformer.Block,
            layout="parallel",
            norm=norm.LayerNorm,
            attention=functools.partial(attention.Attention, rope=rope.Rope(layout="interleaved")),
        ),
        norm=norm.LayerNorm,
        logit_scale=0.0625,
    )


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize("name", TPU_BUDGETS)
def test_tpu_budgets(name, tpu_environment):
    mesh, rules, most_memory, most_peak, most_sent = TPU_BUDGETS[name]
    topology = tpu_topology.parse("v5e:2x2")
    devices = tpu_topology.devices(topology)
    run = recipe(tpu_model(name), mesh=mesh, rules=rules, rows=4, length=512)
    report = compiled(run, devices, hbm_bytes=topology.chip.hbm_bytes)
    sizes = run.model.config
    tokens, width = 4 * 512 // 4, sizes.embed_dim
    assert report.fits
    assert report.memory.arguments + report.memory.temporaries <= most_memory
    assert report.memory.peak <= most_peak
    sent = sum(total.bytes for total in report.collectives.values())
    assert 0.8 * most_sent <= sent <= most_sent
    # Gradients are scattered, not summed whole: what is left are norms and scalars, and under
    # tensor parallelism activations.
    assert report.collectives["all-reduce"].bytes < (0.01 if name == "llama" else 0.2) * sent
    if name == "llama":
        kernels = sizes.num_layers * (4 * width * width + 3 * width * sizes.mlp_dim)
        again = 4 * kernels - sizes.num_layers * width * sizes.mlp_dim
        assert report.flops.products == 2 * tokens * (again + 3 * sizes.vocab_size * width)
    # Forward, again, and 3 + 4 products backward, over half of the keys.
    attention_flops = sizes.num_layers * (2 + 2 + 3 + 4) * 2 * tokens * (513 / 2) * 4 * 64
    assert report.flops.kernels == pytest.approx(attention_flops)
    assert not report.unknown_kernels


# Four chips of each generation, their devices' kind, and meshes with what their chips exchange.
SLICES = [
    ("v5e:2x2", "TPU v5 lite", "fsdp", {"fsdp": 4}, {"all-gather", "reduce-scatter"}),
    ("v5p:2x2x1", "TPU v5", "fsdp", {"fsdp": 4}, {"all-gather", "reduce-scatter"}),
    ("v5p:2x2x1", "TPU v5", "dp", {"data": 4}, {"all-reduce"}),
    ("v6e:2x2", "TPU v6 lite", "fsdp", {"fsdp": 4}, {"all-gather", "reduce-scatter"}),
]


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize(
    ("name", "kind", "rules", "mesh", "exchanged"),
    SLICES,
    ids=[f"{name}-{rules}" for name, _, rules, *_ in SLICES],
)
def test_every_generation_is_counted_alike(name, kind, rules, mesh, exchanged, tpu_environment):
    topology = tpu_topology.parse(name)
    devices = tpu_topology.devices(topology)
    assert [device.device_kind for device in devices] == topology.num_chips * [kind]
    layers, width, hidden, vocabulary = 2, 256, 512, 1024
    model = transformer.Transformer(
        config=config.TransformerConfig(
            vocab_size=vocabulary,
            num_layers=layers,
            embed_dim=width,
            num_heads=2,
            mlp_dim=hidden,
            dtype="bfloat16",
            remat="full",
        ),
        tie_embeddings=False,
    )
    run = recipe(model, mesh=mesh, rules=rules, rows=4, length=512)
    report = compiled(run, devices, hbm_bytes=topology.chip.hbm_bytes)
    assert report.fits
    params = run.program(devices=devices).num_params()
    split = mesh.get("fsdp", 1)
    assert 12 * params / split <= report.memory.arguments <= 1.02 * 12 * params / split

    found = report.collectives
    if rules == "fsdp":  # parameters and gradients, and next to nothing is summed whole
        assert exchanged <= found.keys()
        assert found["all-reduce"].bytes < 0.01 * found["all-gather"].bytes
    else:
        # A ring sends gradients twice, less the part that is already there: bfloat16 or float32.
        assert found.keys() == exchanged
        assert 2 <= found["all-reduce"].bytes / (2 * 3 / 4 * params) <= 4

    # The same products on every generation and mesh; see test_tpu_budgets.
    tokens = 4 * 512 // topology.num_chips
    kernels = layers * (4 * width * width + 3 * width * hidden)
    again = 4 * kernels - layers * width * hidden
    assert report.flops.products == 2 * tokens * (again + 3 * vocabulary * width)
    half_square = layers * 2 * tokens * (513 / 2) * width
    assert report.flops.kernels == pytest.approx((2 + 2 + 3 + 4) * half_square)
    analytic = 3 * (2 * tokens * (kernels + vocabulary * width) + 2 * half_square)
    assert report.flops.analytic == pytest.approx(analytic)
    assert not report.unknown_kernels


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_memory_of_a_chip_is_what_the_compiler_says(name, tpu_environment):
    topology = tpu_topology.parse(name)
    device = tpu_topology.devices(topology)[0]
    array = jax.ShapeDtypeStruct(
        (topology.chip.hbm_bytes // 1024, 1024),  # bytes, and the result as many again
        jax.numpy.uint8,
        sharding=jax.sharding.SingleDeviceSharding(device),
    )
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        jax.jit(lambda x: x + 1).lower(array).compile()
    needed, available = compile_report.out_of_memory(str(raised.value))
    assert available == pytest.approx(topology.chip.hbm_bytes, abs=0.005 * 2**30)
    assert needed > 1.9 * available


@pytest.mark.tpu
@needs_libtpu
def test_one_chip(tpu_environment):
    (device,) = tpu_topology.devices(tpu_topology.parse("v5e:1x1"))
    assert device.device_kind == "TPU v5 lite"


@pytest.mark.tpu
@needs_libtpu
def test_a_slice_that_cannot_be_built(tpu_environment):
    with pytest.raises(
        tpu_topology.TopologyError, match="--topology=v5e:3x3: no v5e slice has this shape"
    ):
        tpu_topology.devices(tpu_topology.parse("v5e:3x3"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "v5e is not a TPU topology"),
        ("v9:4x4", "one of v4, v5e, v5p, v6e"),
        ("v5e:4by4", "is not a TPU topology"),
        ("v5e:4", "2 dimensions, not 1"),
        ("v5p:4x4", "3 dimensions, not 2"),
        ("0xv5e:4x4", "is not a TPU topology"),
        ("v5e:4x4x4", "2 dimensions, not 3"),
    ],
)
def test_bad_topologies(name, message):
    with pytest.raises(tpu_topology.TopologyError, match=message):
        tpu_topology.parse(name)


def test_topology():
    topology = tpu_topology.parse("v5p:4x4x8")
    assert (topology.num_chips, str(topology)) == (128, "v5p:4x4x8")
    slices = tpu_topology.parse("2xv5e:16x16")
    assert (slices.num_chips, slices.slices, str(slices)) == (512, 2, "2xv5e:16x16")


# Programs that do not fit.


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (29.00G) exceeds available HBM (15.75G).",
            (29 * 2**30, 15.75 * 2**30),
        ),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory in memory space hbm. "
            "Used 512.50M of 256.00M hbm. Exceeded hbm capacity by 256.50M.",
            (512.5 * 2**20, 256 * 2**20),
        ),
        ("RESOURCE_EXHAUSTED: scoped vmem", None),
        ("INVALID_ARGUMENT: HLO temporaries (2G) exceeds available HBM (1G)", None),
    ],
)
def test_sizes_of_a_program_that_does_not_fit(message, sizes):
    assert compile_report.out_of_memory(message) == sizes


def test_a_program_that_does_not_fit_is_reported(monkeypatch):
    def compile(self):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (20.00G) exceeds available HBM (15.75G)."
        )

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile)
    run = recipe(plain_llama(), mesh={"fsdp": 8}, rules="fsdp", rows=ROWS, length=LENGTH)
    report = compiled(run, jax.devices()[:8])
    assert not report.fits
    assert report.memory.peak == 20 * 2**30
    assert STATE_BYTES / 8 <= report.memory.arguments <= 1.02 * STATE_BYTES / 8
    assert report.memory.arguments + report.memory.temporaries == report.memory.peak
    assert report.as_json()["flops"] is None
    assert "NO" in compile_report.table(report, [])
    # A program that sends nothing has no table of what it sends.
    assert "collectives" not in compile_report.table(
        dataclasses.replace(report, collectives={}), []
    )


# Kernels.


@pytest.mark.parametrize(("name", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4)])
def test_attention_kernels_by_their_shapes(name, products):
    tables, queries = Array("s8", (1, 4, 4)), Array("bf16", (8, 2048, 128))
    kernel = Kernel(f"splash_mha_{name}_segmented", 1, (tables, tables, queries, queries))
    flops = compile_report.kernel_flops(kernel, mean_keys=1024.5)
    assert flops == products * 2 * 8 * 2048 * 128 * 1024.5


def test_grouped_products_by_their_shapes():
    tables = Array("s32", (5,)), Array("s32", (11,))
    rows, kernels = Array("bf16", (1024, 512)), Array("bf16", (4, 512, 256))
    flops = compile_report.kernel_flops(Kernel("ragged-dot-none", 1, (*tables, rows, kernels)), 4)
    assert flops == 2 * 1024 * 512 * 256
    groups = Kernel("ragged-dot-metadata", 1, tables[:1])
    assert compile_report.kernel_flops(groups, 4) == 0


@pytest.mark.parametrize("rows", [(1024, 512), (512, 1024)])
def test_transposed_grouped_products_by_their_shapes(rows):
    tables = Array("s32", (5,)), Array("s32", (11,))
    matrices = Array("bf16", rows), Array("bf16", (1024, 256))
    flops = compile_report.kernel_flops(Kernel("tgmm.3", 1, (*tables, *matrices)), 4)
    assert flops == 2 * 1024 * 512 * 256


def test_other_kernels_are_not_guessed():
    assert compile_report.kernel_flops(Kernel("gmm", 1, (Array("bf16", (8, 8, 8)),)), 4) is None


# The command.

GIN = ["t5x_configs/models/llama2_7b.gin", "t5x_configs/runs/pretrain.gin"]


def test_needs_neither_data_nor_directory():
    read = functools.partial(
        gin_config.load, entry="espalier.launch.train:train", arguments=RECIPE, unused=UNREAD
    )
    with pytest.raises(gin_config.ConfigError, match="'MODEL_DIR' is required"):
        gin_config.load(GIN, entry="espalier.launch.train:train")
    assert read(GIN, ["BATCH_SIZE=16"]).arguments()["recipe"].batch_size == 16
    # What the user does set is kept.
    assert read(GIN, ["MODEL_DIR=/x"]).macros["MODEL_DIR"] == "/x"
    # Data files may be there or not: instructions to tune on, pairs with a reference, conversations.
    aya = read(["t5x_configs/experiments/aya23/full/8b.gin"]).arguments()["recipe"]
    assert aya.model.config.num_layers == 32
    model, size = "t5x_configs/models/tiny.gin", "TASK_FEATURE_LENGTHS={'targets': 32}"
    for files in (("data/preferences", "runs/preference"), ("data/chat", "runs/finetune")):
        paths = [model, *(f"t5x_configs/{file}.gin" for file in files)]
        bindings = ["TRAIN_STEPS=9", "TRAIN_EPOCHS=None"][: 1 + ("chat" in paths[1])]
        program = read(paths, [*bindings, size]).arguments()["recipe"].program()
        assert program.num_params() > 0
    with pytest.raises(gin_config.ConfigError, match="'PROMPT_FIRST_ID' is required"):
        read([*GIN, "t5x_configs/methods/adapters/prompt.gin"])


def command(*arguments):
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run(
        [sys.executable, "-m", "espalier.launch.precompile", *arguments],
        env=env,
        cwd=environment.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


TINY = [
    "--gin_file=t5x_configs/models/tiny.gin",
    "--gin_file=t5x_configs/runs/pretrain.gin",
    "--gin.BATCH_SIZE=4",
    '--gin.TASK_FEATURE_LENGTHS={"targets": 256}',
]


def test_a_bad_topology_ends_the_command():
    done = command(*TINY, "--topology=v5e:four")
    assert done.returncode == 2
    assert "\nerror: --topology=v5e:four is not a TPU topology" in done.stderr


@pytest.mark.tpu
@needs_libtpu
def test_the_command_writes_the_promised_json(tmp_path):
    path = tmp_path / "new" / "report.json"
    done = command(*TINY, "--topology=v5e:2x2", f"--json={path}")
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert set(report["hbm_bytes"]) == {"arguments", "temporaries", "outputs", "aliased", "peak"}
    assert {"compiled", "analytic"} <= set(report["flops"])
    assert all({"count", "bytes"} <= set(total) for total in report["collectives"].values())
    assert report["fits"] is True
    assert "all-gather" in done.stdout


@pytest.mark.tpu
@needs_libtpu
def test_sigterm_ends_it_without_a_stack_of_libtpu():
    words = [*(f"--gin_file={name}" for name in GIN), "--topology=v5e:4x4", "--gin.BATCH_SIZE=16"]
    process = subprocess.Popen(
        [sys.executable, "-m", "espalier.launch.precompile", *words],
        cwd=environment.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "compiling for 16 x" in process.stdout.readline()
    process.terminate()
    out, error = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGTERM
    assert "SIGTERM" not in out + error and "stack" not in out + error, error


@pytest.mark.tpu
@needs_libtpu
def test_status_1_for_a_run_that_does_not_fit(tmp_path):
    path = tmp_path / "report.json"
    done = command(
        *(f"--gin_file={name}" for name in GIN),
        "--topology=v5e:2x2",
        "--gin.BATCH_SIZE=4",
        '--gin.TASK_FEATURE_LENGTHS={"targets": 2048}',
        f"--json={path}",
    )
    assert done.returncode == 1, done.stderr
    report = json.loads(path.read_text())
    # 12 bytes a parameter over 4 chips are already too much.
    assert report["fits"] is False
    assert report["hbm_bytes"]["arguments"] == pytest.approx(12 * 6.738e9 / 4, rel=1e-3)
    assert report["hbm_bytes"]["peak"] > report["hbm_available_bytes"]
