"""Sums across chips: how they are read from a program, bounds of their error, orders, warnings, and the command itself.

What compiles for TPUs needs libtpu (the extra `tpu`) and is skipped without it.
"""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest

from espalier.launch.config import gin_config
from espalier.launch.numerics import numerics, reductions
from espalier.launch.numerics.__main__ import main
from espalier.launch.numerics.reductions import Reduction, error_bound, unit_roundoff
from espalier.launch.precompile import precompile, tpu_topology
from espalier.launch.precompile.__main__ import RECIPE, UNREAD
from espalier.launch.precompile.hlo import text
from espalier.trainers import partitioning
from espalier.trainers.optim import optimizers
from tests.launch.precompile_test import needs_libtpu
from tests.numerics.orders import DEVICES, ORDERS, total

FILES = [f"t5x_configs/{name}.gin" for name in ("models/tiny", "runs/preference")]
LORA = "t5x_configs/methods/adapters/lora.gin"
SETTINGS = [
    *("TRAIN_STEPS=100", "BATCH_SIZE=16", "TASK_FEATURE_LENGTHS={'targets': 128}"),
    "DTYPE='bfloat16'",
]

# A step of four chips as libtpu writes it, shortened. Results: 0 and 1 leave a loop with one all-reduce of both gradients; 2 has a
# reduce-scatter in a fusion, whose strategy is the fusion's; 3 gets partial sums from two neighbours; 4 is only moved between
# chips after its all-reduce, and added to by a scatter; 5 is the product of one chip; 9 is summed over pairs of chips twice. A norm divides all of them. A maximum and a count are no rounded sums.
PROGRAM = """\
HloModule jit_step, num_partitions=4

%sum (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %s = bf16[] add(%x, %y)
}

%most (x: f32[], y: f32[]) -> f32[] {
  %x.1 = f32[] parameter(0)
  %y.1 = f32[] parameter(1)
  ROOT %m = f32[] maximum(%x.1, %y.1)
}

%body (c: (s32[], bf16[8,4], bf16[4,8], bf16[4,4])) -> (s32[], bf16[8,4], bf16[4,8], bf16[4,4]) {
  %c = (s32[], bf16[8,4], bf16[4,8], bf16[4,4]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %h = bf16[4,4] get-tuple-element(%c), index=3
  %pa = bf16[8,4] dot(%h, %h), lhs_contracting_dims={0}, rhs_contracting_dims={0}
  %pb = bf16[4,8] dot(%h, %h), lhs_contracting_dims={0}, rhs_contracting_dims={0}
  %both = (bf16[8,4], bf16[4,8]) all-reduce(%pa, %pb), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%sum, backend_config={"collective_algorithm_config":{"emitter":"Pincer","strategy":"StrategyND","debug":"colors:2"}}
  %ga = bf16[8,4] get-tuple-element(%both), index=0
  %gb = bf16[4,8] get-tuple-element(%both), index=1
  %act = bf16[4,4] all-reduce(%h), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%sum, metadata={op_name="jit(step)/while/body/layers/mlp/dot_general"}
  ROOT %next = (s32[], bf16[8,4], bf16[4,8], bf16[4,4]) tuple(%i, %ga, %gb, %act)
}

%stop (c: (s32[], bf16[8,4], bf16[4,8], bf16[4,4])) -> pred[] {
  %c.1 = (s32[], bf16[8,4], bf16[4,8], bf16[4,4]) parameter(0)
  %i.1 = s32[] get-tuple-element(%c.1), index=0
  ROOT %lt = pred[] compare(%i.1, %i.1), direction=LT
}

%all-reduce-scatter.1 (p: bf16[16,4]) -> bf16[4,4] {
  %p = bf16[16,4] parameter(0)
  %ar = bf16[16,4] all-reduce(%p), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%sum
  %at = s32[] constant(0)
  ROOT %ds = bf16[4,4] dynamic-slice(%ar, %at, %at), dynamic_slice_sizes={4,4}
}

%hop (q: bf16[4,4], own: bf16[4,4]) -> bf16[4,4] {
  %q = bf16[4,4] parameter(0)
  %own = bf16[4,4] parameter(1)
  ROOT %partial = bf16[4,4] add(%q, %own)
}

ENTRY %main (w: bf16[4,4], u: bf16[16,4], k: s32[4]) -> (f32[8,4], f32[4,8], bf16[4,4], bf16[4,4], bf16[8,4], bf16[4,4], f32[], f32[4], s32[4], bf16[4,4]) {
  %w = bf16[4,4] parameter(0)
  %u = bf16[16,4] parameter(1)
  %k = s32[4] parameter(2)
  %zero = s32[] constant(0)
  %a0 = bf16[8,4] broadcast(%zero), dimensions={}
  %b0 = bf16[4,8] broadcast(%zero), dimensions={}
  %start = (s32[], bf16[8,4], bf16[4,8], bf16[4,4]) tuple(%zero, %a0, %b0, %w)
  %loop = (s32[], bf16[8,4], bf16[4,8], bf16[4,4]) while(%start), condition=%stop, body=%body
  %gra = bf16[8,4] get-tuple-element(%loop), index=1
  %grb = bf16[4,8] get-tuple-element(%loop), index=2
  %square = f32[] dot(%gra, %grb), lhs_contracting_dims={0,1}, rhs_contracting_dims={1,0}
  %norm = f32[] all-reduce(%square), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%sum
  %nspread = f32[8,4] broadcast(%norm), dimensions={}
  %fa = f32[8,4] convert(%gra)
  %na = f32[8,4] divide(%fa, %nspread)
  %nb = f32[4,8] convert(%grb)
  %pu = bf16[16,4] dot(%u, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %gc = bf16[4,4] fusion(%pu), kind=kCustom, calls=%all-reduce-scatter.1, backend_config={"collective_algorithm_config":{"emitter":"ScatterFusion","strategy":"StrategyRing"}}
  %first = bf16[4,4] dot(%w, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %send1 = (bf16[4,4], bf16[4,4], u32[], u32[]) collective-permute-start(%first), channel_id=5, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %got1 = bf16[4,4] collective-permute-done(%send1)
  %second = bf16[4,4] dot(%w, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %sum1 = bf16[4,4] fusion(%got1, %second), kind=kLoop, calls=%hop
  %send2 = (bf16[4,4], bf16[4,4], u32[], u32[]) collective-permute-start(%sum1), channel_id=6, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %got2 = bf16[4,4] collective-permute-done(%send2)
  %gd = bf16[4,4] fusion(%got2, %second), kind=kLoop, calls=%hop
  %pe = bf16[8,4] dot(%u, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %se = bf16[8,4] all-reduce(%pe), channel_id=7, replica_groups={{0,1,2,3}}, to_apply=%sum
  %ge = bf16[8,4] collective-permute(%se), channel_id=8, source_target_pairs={{0,3},{1,2},{2,1},{3,0}}
  %te = bf16[8,4] scatter(%ge, %k, %w), to_apply=%sum
  %sg = bf16[4,4] all-reduce(%first), channel_id=11, replica_groups={{0,1},{2,3}}, to_apply=%sum
  %gg = bf16[4,4] all-reduce(%sg), channel_id=12, replica_groups={{0,2},{1,3}}, to_apply=%sum
  %top = f32[4] convert(%k)
  %highest = f32[4] all-reduce(%top), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%most
  %counts = s32[4] all-reduce(%k), channel_id=10, replica_groups={{0,1,2,3}}, to_apply=%sum
  ROOT %out = (f32[8,4], f32[4,8], bf16[4,4], bf16[4,4], bf16[8,4], bf16[4,4], f32[], f32[4], s32[4], bf16[4,4]) tuple(%na, %nb, %gc, %gd, %te, %first, %norm, %highest, %counts, %gg)
}
"""


@pytest.fixture(scope="module")
def sums():
    return reductions.read(text.parse(PROGRAM), {**dict(enumerate("abcdef")), 9: "g"})


def test_each_sum_has_its_parameter_algorithm_and_chips(sums):
    found = {one.of: (one.algorithm, one.dtype, one.shape, one.terms, one.combined) for one in sums}
    assert found == {
        "a": ("all-reduce", "bf16", (8, 4), 4, ("a", "b")),
        "b": ("all-reduce", "bf16", (4, 8), 4, ("a", "b")),
        "c": ("reduce-scatter", "bf16", (16, 4), 4, ("c",)),
        "d": (reductions.RING, "bf16", (4, 4), 4, ("d",)),
        "e": ("all-reduce", "bf16", (8, 4), 4, ("e",)),  # its permutation moves the finished sum
        "g": ("all-reduce", "bf16", (4, 4), 2, ("g",)),
        "activations layers/mlp": ("all-reduce", "bf16", (4, 4), 2, ("activations layers/mlp",)),
        reductions.SCALARS: ("all-reduce", "f32", (), 4, (reductions.SCALARS,)),
    }
    # No maximum, no count, and nothing twice but the sums of pairs.
    assert len(sums) == len(found) + 1


def test_the_compiler_s_words_are_those_of_the_fusion_around_a_sum(sums):
    words = {one.of: one.backend for one in sums}
    assert words["a"] == words["b"] == "Pincer StrategyND colors:2"
    assert words["c"] == "ScatterFusion StrategyRing"
    assert words["d"] == words["e"] == ""


def layout(sums, mesh=4, chips=(0, 1, 2, 3)):
    return numerics.Layout({"fsdp": mesh}, chips, "p", "b", 1, sums)


def test_changes_name_the_field_and_only_what_differs(sums):
    def changed(**fields):
        return [dataclasses.replace(one, **fields) if one.of == "c" else one for one in sums]

    assert numerics.changes([layout(sums), layout(sums)]) == []
    (found,) = numerics.changes([layout(sums), layout(changed(backend="ScatterFusion StrategyND"))])
    assert (found["layouts"], found["of"], found["field"]) == ([1, 2], "c", "backend")
    assert found["values"] == [["ScatterFusion StrategyRing"], ["ScatterFusion StrategyND"]]
    # Orders of a mesh are compared, and of other meshes only the first order.
    other = [layout(changed(terms=2), 2), layout(changed(terms=2, dtype="f32"), 2)]
    found = numerics.changes([layout(sums), layout(sums), *other])
    assert [(one["layouts"], one["field"]) for one in found] == [
        ([3, 4], "dtype"),
        ([1, 3], "terms"),
    ]


def test_the_bound_is_that_of_one_rounding_for_each_further_term():
    assert unit_roundoff("bf16") == 2.0**-8 and unit_roundoff("f32") == np.finfo(np.float32).eps / 2
    assert [error_bound(n, 0.25) for n in (1, 2, 5)] == [0, 0.25, 1]
    assert Reduction("w", "bf16", (), 8, "all-reduce").bound == 7 / 256


@pytest.mark.parametrize("order", ORDERS)
def test_sums_in_every_order_stay_within_the_bound_of_float64(order):
    rng = np.random.default_rng(0)
    terms_PN = rng.standard_normal((DEVICES, 4096)) * 10.0 ** rng.uniform(-3, 3, (DEVICES, 4096))
    terms_PN = np.asarray(jax.numpy.asarray(terms_PN, "bfloat16"), np.float64)
    error_N = np.abs(np.asarray(total(jax.numpy.asarray(terms_PN), order)) - terms_PN.sum(0))
    size_N = np.abs(terms_PN).sum(0)
    narrow, wide = (error_bound(DEVICES, unit_roundoff(dtype)) for dtype in ("bf16", "f32"))
    bound = wide if order == "float32" else narrow
    assert (error_N <= bound * size_N).all()
    assert (error_N / size_N).max() > 0.05 * bound  # it rounds, and the bound is not far away


def test_orders_differ_where_rounding_is_not_associative():
    # Eight terms of which seven are each half a unit of the last place of the first: a chain from the first loses them all.
    terms_PN = jax.numpy.asarray([[1.0]] + 7 * [[2.0**-8]])
    found = {order: float(total(terms_PN, order)[0]) for order in ORDERS}
    assert found == {
        **{"float32": 1 + 7 * 2.0**-8, "ascending": 1.0, "descending": 1 + 8 * 2.0**-8},
        **{"ring": 1 + 8 * 2.0**-8, "pairs": 1 + 6 * 2.0**-8},
    }


def test_orders_are_the_run_s_own_its_reverse_and_random_ones():
    own = [0, 2, 1, 3]
    found = numerics.orders_for(own, 24)
    assert found[:2] == [(0, 2, 1, 3), (3, 1, 2, 0)] and len(set(found)) == 24
    assert numerics.orders_for(own, None) == found[:2]
    assert numerics.orders_for(own, 5) == found[:5]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--order=0,1,2"],
            "--order=0,1,2 is no order of 4 chips: give each number from 0 to 3 once.",
        ),
        (["--order=0,1,2,2"], "is no order of 4 chips"),
        (["--order=a"], "--order=a is not a list of chips"),
        (["--orders=25"], "--orders=25: 4 chips have 1 to 24 orders"),
        (["--orders=0"], "--orders=0: 4 chips have"),
        (["--mesh=4"], "--mesh=4 is not a mesh"),
        (["--mesh={'fsdp': 4}"], "is not a mesh: give sizes by axis"),
        (["--topology=v5p:1x1x1"], "--topology=v5p:1x1x1 is one chip"),
        (["--topology=2xv5e:2x2"], "has 2 slices"),
    ],
)
def test_bad_layouts_are_refused_by_name(flags, message, tpu_environment, capsys):
    words = [*(f"--gin_file={file}" for file in FILES), *(f"--gin.{s}" for s in SETTINGS)]
    assert main([*words, "--topology=v5p:2x2x1", *flags]) == 2
    assert message in capsys.readouterr().err


def recipe(*bindings, lora=True):
    files = [*FILES, LORA] if lora else FILES
    words = [*SETTINGS, *(["LORA_LAYERS=['.*attention/query']"] if lora else []), *bindings]
    entry = "espalier.launch.train:train"
    config = gin_config.load(files, words, entry=entry, arguments=RECIPE, unused=UNREAD)
    return config.arguments()["recipe"]


QUERY = "layers/block_0/attention/query/adapter_lora/lora_"
EXCHANGED = ["LORA_A_INIT=@jax.nn.initializers.zeros", "LORA_B_INIT=@lora.uniform_fan_in"]


def warned(run, dtype="bf16", terms=4):
    program = precompile.resolved(run, 4)
    paths = numerics._trained(program)
    sums = [Reduction(path, dtype, (8, 8), terms, "all-reduce") for path in paths]
    return numerics.warnings(program, [layout(sums)])


@pytest.mark.parametrize(("bindings", "zero"), [([], "b"), (EXCHANGED, "a")])
def test_it_warns_of_the_factor_that_starts_at_0(bindings, zero):
    (warning,) = warned(recipe(*bindings))
    assert (
        warning.startswith(f"adapters that start at 0: {QUERY}{zero}. The first")
        and "summed in bf16 over 4 chips (all-reduce)" in warning
    )


def test_it_does_not_warn_where_rounding_does_not_decide_a_sign():
    run = recipe()
    assert warned(run, dtype="f32") == []
    assert warned(run, terms=2) == []  # two terms are rounded once, in either order
    assert warned(dataclasses.replace(run, optimizer=sgd)) == []
    assert (
        warned(recipe(lora=False)) == []
    )  # biases and others that start at 0 have a model around them


def sgd(*, learning_rate, param_axes):
    import optax

    return optimizers._clipped(optax.sgd(learning_rate), 1.0)


def test_adam_and_lion_are_free_of_scale_and_plain_descent_is_not():
    run = recipe()
    for optimizer, expected in ((optimizers.adamw, True), (optimizers.lion, True), (sgd, False)):
        program = precompile.resolved(dataclasses.replace(run, optimizer=optimizer), 4)
        assert numerics.is_scale_free(program) == expected


@pytest.mark.tpu
@needs_libtpu
def test_a_run_has_the_same_order_of_chips_however_they_are_listed(tpu_environment):
    devices = list(tpu_topology.devices(tpu_topology.parse("v5p:2x2x1")))
    for shape in ({"fsdp": 4}, {"data": 2, "fsdp": 2}):
        meshes = set()
        for seed in range(4):
            listed = random.Random(seed).sample(devices, 4)
            mesh = partitioning.make_mesh(shape=shape, devices=listed)
            meshes.add(tuple(device.id for device in mesh.devices.flat))
        assert len(meshes) == 1


def compared(run, **settings):
    # As started from the command line, without the tests' exact products.
    with jax.default_matmul_precision("default"), jax.numpy_rank_promotion("allow"):
        return numerics.numerics(run, "v5p:2x2x1", **settings)


@pytest.mark.tpu
@needs_libtpu
def test_a_step_of_absent_chips_in_two_orders_and_in_float32(tpu_environment, tmp_path, capsys):
    """Every adapter's gradient is found; its dtype is that of the products, and DTYPE changes it."""
    target, xla = tmp_path / "report.json", "attention.Attention.implementation='xla'"
    risky = compared(recipe(xla), json_file=str(target))
    printed = capsys.readouterr().out
    layouts = json.loads(target.read_text())["layouts"]
    assert [one["chips"] for one in layouts] == [[0, 2, 1, 3], [3, 1, 2, 0]]
    for one in layouts:
        found = {s["of"]: s for s in one["sums"]}
        assert set(found) == {f"{QUERY}a", f"{QUERY}b", reductions.SCALARS}
        assert {s["terms"] for s in found.values()} == {4}
        assert found[f"{QUERY}b"]["dtype"] == "bf16" and found[reductions.SCALARS]["dtype"] == "f32"
    assert len(risky) == 1 and f"WARNING: {risky[0]}" in printed
    assert compared(recipe(xla, "DTYPE='float32'"), orders=1) == []
    assert "bf16" not in capsys.readouterr().out
