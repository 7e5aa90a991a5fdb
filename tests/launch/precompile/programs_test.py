"""Programs other than training steps, compiled for simulated devices: their FLOPs in closed form, and their memory."""

import dataclasses

import jax
import pytest

from espalier.launch.precompile import precompile, programs
from espalier.launch.precompile.settings import Options
from espalier.model import rows
from espalier.model.kv_cache.full import FullCache
from espalier.model.kv_cache.snapkv import SnapKV
from tests.launch import precompile_test as runs

ROWS, PROMPT = 2, 64
D, V, L, F = runs.D, runs.V, runs.L, runs.F


WHOLE = FullCache()


def compiled(kind, policy=WHOLE, **options):
    mesh = {"fsdp": 2, "tensor": 2}
    run = runs.recipe(runs.plain_llama(), mesh=mesh, rules="fsdp_tp", rows=ROWS, length=PROMPT)
    program = run.program(devices=jax.devices()[:4])
    work = programs.work(kind, program, policy, Options(**options))
    with jax.default_matmul_precision("default"), jax.numpy_rank_promotion("allow"):
        return work, precompile.compile_work(work, program, hbm_bytes=1e12)[0]


def test_one_token_of_decoding():
    work, report = compiled("decode", max_new_tokens=17)
    assert (work.per, work.open_loops) == ("token", 1)
    slots = PROMPT + 16
    # Weights and logits once for each row, and each query with all slots, empty ones too.
    flops = 2 * ROWS * (runs.KERNELS + V * D) + 2 * 2 * ROWS * L * slots * D
    assert report.flops.products * 4 == flops
    assert report.flops.analytic is None and "ratio" not in str(report.as_json())
    caches = L * 2 * ROWS * slots * D * 4
    params = 4 * runs.PARAMS
    assert report.memory.arguments * 4 == pytest.approx(caches + params, rel=0.03)
    assert report.memory.aliased * 4 >= caches  # the caches are donated


def test_int8_weights_are_a_quarter_of_float32_ones():
    _, full = compiled("decode", max_new_tokens=17)
    work, small = compiled("decode", max_new_tokens=17, weights_dtype="int8")
    kernel = work.arguments[0]["layers"]["block_0"]["mlp"]["up"]["kernel"]
    assert kernel.dtype == "int8" and kernel.sharding.shard_shape(kernel.shape) == (D // 2, F // 2)
    scales = 4 * L * (4 * D + 2 * F + D)
    saved = 3 * runs.KERNELS - scales
    # Four devices share kernels; two of them, those along `tensor` or `fsdp`, the scales.
    assert full.memory.arguments - small.memory.arguments == pytest.approx(saved / 4, rel=0.01)
    assert full.flops.products == small.flops.products


def test_snapkv_decodes_from_its_capacity():
    _, full = compiled("decode", max_new_tokens=17)
    _, small = compiled("decode", SnapKV(capacity=16, window=4, kernel=3), max_new_tokens=17)
    saved = L * 2 * ROWS * (PROMPT - 16) * D * 4 / 4
    assert full.memory.arguments - small.memory.arguments == pytest.approx(saved, rel=0.02)


def test_reading_a_prompt():
    work, report = compiled("prefill", max_new_tokens=2)
    products = 2 * ROWS * (PROMPT * runs.KERNELS + V * D)  # logits of the last token alone
    attention = 2 * 2 * ROWS * L * PROMPT * PROMPT * D
    assert report.flops.products * 4 == products + attention
    causal = attention * (PROMPT + 1) / (2 * PROMPT)
    assert work.model_flops == pytest.approx(2 * ROWS * PROMPT * runs.KERNELS + causal)


def test_a_batch_of_covariances():
    run = runs.recipe(runs.plain_llama(), mesh={"fsdp": 2}, rules="fsdp", rows=ROWS, length=PROMPT)
    program = run.program(devices=jax.devices()[:2])
    work = programs.work("covariances", program, FullCache(), Options(blocks=2))
    with jax.default_matmul_precision("default"), jax.numpy_rank_promotion("allow"):
        report = precompile.compile_work(work, program, hbm_bytes=1e12)[0]
    # Of gate, up and down: squares of inputs and of gradients of outputs in two blocks, split over both devices, and a
    # count for each layer; losses are whole.
    entries = L * ((2 * D * D + F * F) + (2 * F * F + D * D)) / 2
    assert report.memory.outputs == pytest.approx(
        4 * (entries / 2 + 3 * L + ROWS * PROMPT), rel=0.01
    )
    assert report.flops.analytic is None


def test_a_batch_of_squares_and_of_scores():
    """Eigenvectors and queries are arguments, split over both devices; squares are as large as the matrices, scores whole."""
    run = runs.recipe(runs.plain_llama(), mesh={"fsdp": 2}, rules="fsdp", rows=ROWS, length=PROMPT)
    program = run.program(devices=jax.devices()[:2])
    reports = {}
    for kind in ("covariances", "squares", "scores"):
        work = programs.work(kind, program, FullCache(), Options(queries=3, rank=2))
        with jax.default_matmul_precision("default"), jax.numpy_rank_promotion("allow"):
            reports[kind] = precompile.compile_work(work, program, hbm_bytes=1e12)[0]
    memory = {kind: report.memory for kind, report in reports.items()}
    base = memory["covariances"].arguments
    squared = 3 * L * (D * D + F * F)
    eigenvectors = memory["squares"].arguments - base
    assert eigenvectors == pytest.approx(4 * squared / 2, rel=0.01)
    nats = ROWS * PROMPT
    assert memory["squares"].outputs == pytest.approx(4 * (3 * L * D * F / 2 + nats), rel=0.01)
    queries = memory["scores"].arguments - base
    assert queries == pytest.approx(2 * 3 * 3 * L * 2 * (D + F) / 2, rel=0.05)
    scores = (
        3 * L * ROWS * (3 + 1)
    )  # and squared norms; the results' table of pointers is beside them
    assert memory["scores"].outputs == pytest.approx(4 * (scores + nats), abs=100)


def test_an_encoder_decoder_has_no_program_of_generation():
    run = runs.recipe(runs.plain_llama(), mesh={"fsdp": 2}, rules="fsdp", rows=ROWS, length=PROMPT)
    program = run.program(devices=jax.devices()[:2])
    other = dataclasses.replace(program, recipe=_WithRow(run))
    with pytest.raises(ValueError, match="decoders without an encoder alone"):
        programs.work("decode", other, FullCache(), Options())


class _WithRow:
    """A recipe whose model reads inputs."""

    def __init__(self, recipe):
        self._recipe, self.language_model = recipe, self
        self.row = rows.INPUTS_AND_TARGETS

    def __getattr__(self, name):
        return getattr(self._recipe, name)
