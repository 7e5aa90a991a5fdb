"""The reader of compiled programs against closed forms: products, loop trips, bytes on the wire.

The programs are kept as text (goldens/make_hlo.py compiles them anew), so that no libtpu is needed.
"""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import pytest

from espalier.launch.precompile.hlo import analysis, collectives, loops, text
from espalier.launch.precompile.hlo.text import HloError
from tests.launch.goldens import make_hlo

GOLDENS = pathlib.Path(make_hlo.__file__).parent
LAYERS, ROWS, WIDTH, CHIPS = make_hlo.LAYERS, make_hlo.ROWS, make_hlo.WIDTH, make_hlo.CHIPS


def golden(name):
    return (GOLDENS / f"{name}.hlo").read_text()


def program(body, header="HloModule m, num_partitions=8", result="f32[]"):
    """A program with the given lines in its entry computation and, before it, others."""
    before, _, lines = body.rpartition("---\n")
    return f"{header}\n\n{before}\nENTRY %main (p: f32[]) -> {result} {{\n{lines}}}\n"


@pytest.mark.parametrize("platform", ["v5e", "cpu"])
def test_products_of_a_rematerialised_scan(platform):
    # Forward, recomputed forward, and two products backward, per layer.
    expected = LAYERS * 4 * 2 * ROWS * WIDTH * WIDTH
    assert analysis.analyse(golden(f"scanned_layers_{platform}")).flops == expected


def test_fsdp_gathers_each_weight_twice_and_scatters_its_gradient_once():
    found = analysis.analyse(golden("scanned_layers_v5e")).collectives
    shard = 2 * WIDTH * WIDTH // CHIPS  # bytes of bfloat16
    sent = shard * (CHIPS - 1)
    assert found == {
        "all-gather": collectives.Total(2 * LAYERS, 2 * LAYERS * sent, sent),
        "reduce-scatter": collectives.Total(LAYERS, LAYERS * sent, sent),
    }


def test_cpu_reduces_whole_weights_in_float32():
    found = analysis.analyse(golden("scanned_layers_cpu")).collectives
    whole = 4 * WIDTH * WIDTH
    each = 2 * whole * (CHIPS - 1) // CHIPS
    assert found["all-reduce"] == collectives.Total(LAYERS, LAYERS * each, each)


def test_windowed_product():
    """A gather that the compiler turned into products with the shards as they pass by."""
    found = analysis.analyse(golden("windowed_product_v5e"))
    assert found.flops == 2 * 2048 * 4096 * 4096
    shard = 2 * 4096 * 4096 // 16
    # One permute ahead of the loop, then both directions twice in each of 4 trips.
    assert found.collectives == {
        "collective-permute": collectives.Total(1 + 4 * 4, (1 + 4 * 4) * shard, shard)
    }


def test_kernel_whose_metadata_spans_lines():
    (kernel,) = analysis.analyse(golden("kernel_v5e")).kernels
    assert (kernel.name, kernel.count) == ("double_kernel", 3)
    assert [operand.dims for operand in kernel.operands] == [(ROWS, WIDTH)]


def test_agrees_with_the_products_of_this_jaxs_own_cpu_program():
    def loss(w_DF, x_BD):
        return jax.lax.fori_loop(0, 5, lambda i, x_BD: jnp.tanh(x_BD @ w_DF) @ w_DF.T, x_BD).sum()

    compiled = (
        jax.jit(loss)
        .lower(jax.ShapeDtypeStruct((24, 16), "float32"), jax.ShapeDtypeStruct((8, 24), "float32"))
        .compile()
    )
    assert analysis.analyse(compiled.as_text()).flops == 5 * 2 * 2 * 8 * 24 * 16


# Trip counts.

LOOP = """\
%body (t: (s32[], s32[])) -> (s32[], s32[]) {{
  %t = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] get-tuple-element(%t), index=1
  %by = s32[] constant({step})
  %next = s32[] {change}(%i, %by)
  ROOT %r = (s32[], s32[]) tuple(%next, %n)
}}

%condition (u: (s32[], s32[])) -> pred[] {{
  %u = (s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%u), index=0
  %limit = s32[] {limit}
  ROOT %c = pred[] compare({order}), direction={direction}
}}
---
  %start = s32[] constant({start})
  %stop = s32[] constant({stop})
  %init = (s32[], s32[]) tuple(%start, %stop)
  ROOT %w = (s32[], s32[]) while(%init), condition=%condition, body=%body
"""


@pytest.mark.parametrize("passed", [False, True], ids=["constant", "in_the_tuple"])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("start", "stop", "step", "direction", "trips"),
    [
        (0, 8, 2, "LT", 4),  # a windowed loop
        (0, 32, 1, "LT", 32),  # a scan
        (3, 10, 3, "LT", 3),
        (0, 7, 1, "LE", 8),
        (7, -1, -1, "GT", 8),
        (6, 0, -2, "GE", 4),
        (0, 5, 1, "NE", 5),
        (4, 4, 1, "LT", 0),
    ],
)
def test_trip_counts(start, stop, step, direction, trips, swapped, passed):
    if swapped:
        direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
    loop = LOOP.format(
        start=start,
        stop=stop,
        step=abs(step),
        change="add" if step > 0 else "subtract",
        direction=direction,
        order="%limit, %j" if swapped else "%j, %limit",
        limit="get-tuple-element(%u), index=1" if passed else f"constant({stop})",
    )
    counts = loops.executions(text.parse(program(loop)))
    assert counts == {"body": trips, "condition": trips + 1, "main": 1}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"step": 0}, "does not compare a counter"),
        ({"limit": "constant(-5)"}, None),  # starts beyond its limit: no trip
        ({"step": -1}, "would never end"),
        ({"change": "multiply"}, "does not compare a counter"),
    ],
)
def test_a_loop_without_an_end_is_an_error(change, why):
    values = {
        "start": 0,
        "stop": 8,
        "step": 1,
        "change": "add",
        "direction": "LT",
        "order": "%j, %limit",
        "limit": "constant(8)",
    }
    module = text.parse(program(LOOP.format(**{**values, **change})))
    if why is None:
        assert loops.executions(module)["body"] == 0
    else:
        with pytest.raises(HloError, match=f"loop w .*{why}"):
            loops.executions(module)


# Convolutions, against every tap counted one by one.


@pytest.mark.parametrize("rhs_dilate", [1, 2])
@pytest.mark.parametrize("lhs_dilate", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("low", "high"), [(0, 0), (3, 1), (4, 4)])
def test_convolution_counts_only_taps_that_meet_data(low, high, stride, lhs_dilate, rhs_dilate):
    lhs, size = 6, 3
    width = (lhs - 1) * lhs_dilate + 1 + low + high
    out = (width - (size - 1) * rhs_dilate - 1) // stride + 1
    taps = sum(
        0 <= (at := o * stride + tap * rhs_dilate - low) <= (lhs - 1) * lhs_dilate
        and at % lhs_dilate == 0
        for o, tap in itertools.product(range(out), range(size))
    )
    module = text.parse(
        program(
            f"""\
  %x = f32[5,{lhs},2]{{2,1,0}} parameter(0)
  %k = f32[{size},7,2]{{2,1,0}} parameter(1)
  ROOT %c = f32[{out},5,7]{{2,1,0}} convolution(%x, %k), window={{size={size} stride={stride} \
pad={low}_{high} lhs_dilate={lhs_dilate} rhs_dilate={rhs_dilate}}}, dim_labels=b0f_0oi->0bf
"""
        )
    )
    found = analysis.product_flops(module, module.entry.instructions["c"])
    assert found == 2 * 5 * 2 * 7 * taps


def test_window_entries_are_in_the_order_of_the_spatial_digits():
    # x is [b, 1, f, 0]: the window's first entry belongs to digit 0, the last dimension of x.
    module = text.parse(
        program(
            """\
  %x = bf16[9,1,4,2]{3,2,1,0} parameter(0)
  %k = bf16[32,5,1,4]{3,2,1,0} parameter(1)
  ROOT %c = bf16[9,1,5,33]{3,2,1,0} convolution(%x, %k), window={size=32x1 pad=31_31x0_0 \
rhs_reversal=1x0}, dim_labels=b1f0_0o1i->b1f0
"""
        )
    )
    # Full overlap: each of the 2 data positions meets each of the 32 taps once.
    assert analysis.product_flops(module, module.entry.instructions["c"]) == 2 * 9 * 4 * 5 * 2 * 32


# Collectives.


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3}}", 2),
        ("{}", 8),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['a'=4,'b'=2] {'a'}", 4),
        ("mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("mesh['a'=4,'b'=2], device_ids=(0,2,1,3,4,5,6,7) {'b'}", 2),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", 4),
        ("mesh['a'=4,'b'=2]device_ids=([8]) {'a':(2)2}", 2),
    ],
)
def test_group_size_in_all_notations(groups, size):
    module = text.parse(
        program(
            f"""\
  %x = f32[16]{{0}} parameter(0)
  ROOT %g = f32[16]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add
"""
        )
    )
    instruction = module.entry.instructions["g"]
    assert collectives.group_size(instruction, module.num_partitions) == size


def test_an_unreadable_group_is_an_error():
    lines = """\
  %x = f32[16]{0} parameter(0)
  ROOT %g = f32[16]{0} all-reduce(%x), channel_id=1, replica_groups=some, to_apply=%add
"""
    with pytest.raises(HloError, match="all-reduce g has replica_groups='some'"):
        analysis.analyse(program(lines))


WIRE = """\
%all-reduce-scatter.1 (a: f32[64]) -> f32[16] {
  %a = f32[64]{0} parameter(0)
  %whole = f32[64]{0} all-reduce(%a), channel_id=7, replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %part = f32[16]{0} dynamic-slice(%whole, %zero), dynamic_slice_sizes={16}
}
---
  %x = f32[64]{0} parameter(0)
  %gather = f32[256]{0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  %reduce = f32[64]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %swap = f32[64]{0} all-to-all(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  %back = f32[64]{0} all-to-all(%swap), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  %shift = f32[64]{0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %still = f32[64]{0} collective-permute(%x), channel_id=1, source_target_pairs={{0,0},{1,1}}
  ROOT %scatter = f32[16]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
"""


def test_bytes_on_the_wire():
    found = analysis.analyse(program(WIRE)).collectives
    assert {kind: (total.count, total.bytes) for kind, total in found.items()} == {
        "all-gather": (1, 256 * 3),
        "all-reduce": (1, 2 * 256 * 3 // 4),
        "all-to-all": (2, 2 * 256 * 3 // 4),  # of jax.lax, with one channel
        "collective-permute": (1, 256),  # nothing moves in the other one
        "reduce-scatter": (1, 256 * 3 // 4),
    }


def test_a_collective_repeated_in_several_fusions_counts_once():
    repeats = """\
%start (a: f32[64]) -> f32[256] {
  %a = f32[64]{0} parameter(0)
  ROOT %g1 = f32[256]{0} all-gather(%a), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}

%carried (b: f32[64]) -> f32[256] {
  %b = f32[64]{0} parameter(0)
  ROOT %g2 = f32[256]{0} all-gather(%b), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}

%body (t: (s32[], f32[64])) -> (s32[], f32[64]) {
  %t = (s32[], f32[64]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %v = f32[64]{0} get-tuple-element(%t), index=1
  %f = f32[256]{0} fusion(%v), kind=kLoop, calls=%carried
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %r = (s32[], f32[64]) tuple(%next, %v)
}

%condition (u: (s32[], f32[64])) -> pred[] {
  %u = (s32[], f32[64]) parameter(0)
  %j = s32[] get-tuple-element(%u), index=0
  %n = s32[] constant(9)
  ROOT %c = pred[] compare(%j, %n), direction=LT
}
---
  %x = f32[64]{0} parameter(0)
  %s = f32[256]{0} fusion(%x), kind=kLoop, calls=%start
  %zero = s32[] constant(0)
  %init = (s32[], f32[64]) tuple(%zero, %x)
  ROOT %w = (s32[], f32[64]) while(%init), condition=%condition, body=%body
"""
    found = analysis.analyse(program(repeats)).collectives
    assert found == {"all-gather": collectives.Total(1, 256 * 3, 256 * 3)}


# Slices.


@pytest.mark.parametrize(
    ("kind", "slices", "sent"),
    [
        ("ALL_REDUCE", "1,2", 4096),  # half twice
        ("ALL_REDUCE", "1,2,3,4", 6144),
        ("ALL_GATHER", "1,2,3,4", 3 * 4096),
        ("REDUCE_SCATTER", "1,2", 2048),
        ("ALL_TO_ALL", "1,2,3,4", 3072),
        ("ONE_TO_ONE", "1,2", 4096),
    ],
)
def test_what_slices_exchange_is_counted_apart(kind, slices, sent):
    transfer = f'_xla_megascale_target="{{{slices}}}x{{0:3}}",_xla_megascale_transfer_type="{kind}"'
    lines = f"""\
  %x = bf16[8,256]{{1,0}} parameter(0)
  %token = token[] after-all()
  %send = (bf16[8,256]{{1,0}}, u32[], token[]) send(%x, %token), channel_id=2, is_host_transfer=true, frontend_attributes={{{transfer}}}
  ROOT %done = token[] send-done(%send), channel_id=2
"""
    found = analysis.analyse(program(lines, result="token[]")).collectives
    name = "between-slices " + kind.lower().replace("_", "-")
    assert found == {name: collectives.Total(1, sent, sent)}
    assert collectives.sent(found) == (0, sent)


def test_an_unknown_exchange_of_slices_is_an_error():
    lines = """\
  %x = f32[8]{0} parameter(0)
  %token = token[] after-all()
  %send = (f32[8]{0}, u32[], token[]) send(%x, %token), frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="NEW"}
  ROOT %done = token[] send-done(%send)
"""
    with pytest.raises(HloError, match="'NEW'"):
        analysis.analyse(program(lines, result="token[]"))


def test_one_trip_counts_of_a_loop_that_data_end():
    def fall(x_BD, w_DD):
        def more(carry):
            return carry[1].sum() > 1.0

        def step(carry):
            count, x_BD = carry
            for _ in range(2):
                x_BD = jax.lax.fori_loop(0, 3, lambda _, x_BD: x_BD @ w_DD, x_BD)
            return count + 1, x_BD

        return jax.lax.while_loop(more, step, (0, x_BD))

    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((8, 16), (16, 16))]
    compiled = jax.jit(fall).lower(*shapes).compile().as_text()
    with pytest.raises(HloError, match="trip count"):
        analysis.analyse(compiled)
    assert analysis.analyse(compiled, open_loops=1).flops == 2 * 3 * 2 * 8 * 16 * 16


# Memory traffic.


def moved(lines):
    module = text.parse(program(lines))
    return analysis.hbm_bytes(module, loops.executions(module))


def test_traffic_counts_operands_and_results_in_main_memory_only():
    lines = """\
  %x = f32[100]{0} parameter(0)
  %near = f32[100]{0:T(128)S(1)} copy(%x)
  ROOT %y = f32[100]{0} add(%near, %x)
"""
    assert moved(lines) == 400 + 2 * 400  # the copy reads x; the sum reads x and writes y


def test_traffic_of_slices_is_their_own_size():
    lines = """\
%update (p: f32[10,100], q: f32[1,100], i: s32[]) -> f32[10,100] {
  %p = f32[10,100]{1,0} parameter(0)
  %q = f32[1,100]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %u = f32[10,100]{1,0} dynamic-update-slice(%p, %q, %i, %zero)
}

%take (p: f32[10,100], i: s32[]) -> f32[1,100] {
  %p = f32[10,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %s = f32[1,100]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,100}
}
---
  %x = f32[10,100]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %row = f32[1,100]{1,0} fusion(%x, %i), kind=kLoop, calls=%take
  ROOT %new = f32[10,100]{1,0} fusion(%x, %row, %i), kind=kLoop, calls=%update
"""
    assert moved(lines) == (400 + 400) + (400 + 400)


def test_a_computation_of_another_unit_ends_with_the_units_name():
    module = text.parse(
        "HloModule jit_f, num_partitions=2\n\n"
        "%gather (p: f32[8,4]) -> f32[4,4] {\n"
        "  %p = f32[8,4]{1,0} parameter(0)\n"
        "  ROOT %slice = f32[4,4]{1,0} slice(%p), slice={[0:4], [0:4]}\n"
        '}, execution_thread="sparsecore"\n\n'
        "ENTRY %main (a: f32[8,4]) -> f32[4,4] {\n"
        "  %a = f32[8,4]{1,0} parameter(0)\n"
        "  ROOT %call = f32[4,4]{1,0} fusion(%a), kind=kLoop, calls=%gather\n"
        "}\n"
    )
    assert set(module.computations) == {"gather", "main"}
    assert module.computations["gather"].result.opcode == "slice"


def test_text_that_is_no_program_is_an_error():
    with pytest.raises(HloError, match="no ENTRY"):
        text.parse("module @jit_f { func.func public @main() }")
    with pytest.raises(HloError, match="cannot read in computation main"):
        text.parse(program("  garbage\n"))
