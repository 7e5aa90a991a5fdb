"""Documents of packed rows as cuDNN's sequences: what the kernel is given, and that no mask of a row's pairs is made.

No GPU is needed: programs are exported for CUDA, and NumPy computes what the documented arguments mean.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from espalier.data.stream import plan
from espalier.model.kernels import attention_fused
from espalier.model.kernels.attention_ops import dot_product_attention
from espalier.model.kernels.platform import use_platform

binding = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")

SEGMENTS = np.array([[1] * 5 + [2] * 1 + [3] * 4 + [0] * 2, [1] * 12, [7] * 6 + [1] * 6])


@pytest.fixture
def gpu(monkeypatch):
    """A Hopper GPU with cuDNN 9.10, or another one of this capability, version and platform."""

    def use(capability="9.0", cudnn=91_000, platform="cuda 12090"):
        device = types.SimpleNamespace(compute_capability=capability)
        client = types.SimpleNamespace(platform_version=platform, local_devices=lambda: [device])
        monkeypatch.setattr(attention_fused.backend, "get_backend", lambda name=None: client)
        monkeypatch.setattr(binding, "check_cudnn_version", lambda: cudnn)
        monkeypatch.setattr(binding, "check_compute_capability", lambda wanted: wanted <= "9.0")
        monkeypatch.setattr(binding, "is_cuda_compute_capability_equal", lambda wanted: False)

    use()
    return use


def rows(length, *, heads=2, kv_heads=1, dtype=jnp.bfloat16):
    shapes = [(2, length, n, 64) for n in (heads, kv_heads, kv_heads)]
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def test_sequences_are_the_runs_of_rows():
    count, lengths, starts = attention_fused.sequences(jnp.asarray(SEGMENTS), 5)
    np.testing.assert_array_equal(count, [4, 1, 2])
    np.testing.assert_array_equal(
        lengths, [[5, 1, 4, 2, -1], [12, -1, -1, -1, -1], [6, 6, -1, -1, -1]]
    )
    np.testing.assert_array_equal(
        starts, [[0, 5, 6, 10, -1], [0, -1, -1, -1, -1], [0, 6, -1, -1, -1]]
    )
    count, lengths, _ = attention_fused.sequences(jnp.asarray(SEGMENTS), 2)
    np.testing.assert_array_equal(count, [4, 1, 2])  # more than there is room for
    np.testing.assert_array_equal(lengths, [[5, 1], [12, -1], [6, 6]])


def test_rows_of_the_data_pipeline_have_room():
    # Of pairs, each record is two completions; padding is a sequence of its own.
    assert attention_fused.MAX_SEQUENCES >= 2 * plan.MAX_SEGMENTS + 1


@pytest.mark.parametrize("causal", [True, False])
def test_what_cudnn_is_given_means_the_reference(gpu, monkeypatch, causal):
    """The binding is replaced by NumPy, which reads the arguments as their documentation says."""

    def attend(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type, **window):
        assert window == {"sliding_window_length": None}
        assert mask_type == getattr(binding.MaskType, "PADDING_CAUSAL" if causal else "PADDING")
        assert q_offsets.shape[1] == q_seqlen.shape[1] + 1
        q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
        out = np.full(q.shape, np.nan)
        for b, row in enumerate(np.asarray(q_seqlen)):
            for m in np.flatnonzero(row >= 0):
                own = slice(q_offsets[b, m], q_offsets[b, m] + row[m])
                keys = slice(kv_offsets[b, m], kv_offsets[b, m] + kv_seqlen[b, m])
                logits = scale * np.einsum("tnh,snh->nts", q[b, own], k[b, keys])
                if causal:
                    logits = np.where(np.tri(row[m], dtype=bool), logits, -np.inf)
                weights = np.exp(logits - logits.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                out[b, own] = np.einsum("nts,snh->tnh", weights, v[b, keys])
        return jnp.asarray(out, jnp.float32)

    monkeypatch.setattr(binding, "dot_product_attention", attend)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (3, 12, n, 8)) for key, n in zip(keys, (4, 2, 2), strict=True)
    )
    options = {"causal": causal, "window": None, "scale": 0.3}
    got = attention_fused.packed_attention(q, k, v, jnp.asarray(SEGMENTS), **options)
    want = dot_product_attention(
        *(q, k, v),
        q_segments_BT=jnp.asarray(SEGMENTS),
        causal=causal,
        scale=0.3,
        implementation="reference",
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(attention_fused, "MAX_SEQUENCES", 2)
    got = attention_fused.packed_attention(q, k, v, jnp.asarray(SEGMENTS), **options)
    assert np.isnan(got[0]).all()  # four sequences, never an answer with some of them
    np.testing.assert_allclose(got[1:], want[1:], rtol=1e-5, atol=1e-5)


def exported(length, segments, **options):
    """StableHLO for CUDA of attention and its gradients."""

    def loss(q, k, v, segments_BT):
        own = {"q_segments_BT": segments_BT} if segments else {}
        out = dot_product_attention(q, k, v, **own, **options)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    grads = jax.jit(jax.grad(loss, (0, 1, 2)))
    checks = [
        export.DisabledSafetyCheck.custom_call(f"__cudnn$fmhaSoftmax{end}")
        for end in ("", "Backward")
    ]
    checks += [
        export.DisabledSafetyCheck.custom_call(f"__cudnn$fmhaScaleBiasSoftmax{end}")
        for end in ("", "Backward")
    ]
    with use_platform("gpu"):
        lowered = export.export(grads, platforms=["cuda"], disabled_checks=checks)
        shapes = (*rows(length), jax.ShapeDtypeStruct((2, length), jnp.int32))
        return lowered(*shapes).mlir_module()


def test_no_pairs_of_positions_of_long_packed_rows_are_in_memory(gpu):
    length = 1024
    text = exported(length, segments=True, window=100)
    assert text.count("__cudnn$fmhaSoftmax") >= 2  # forward and backward
    assert f"{length}x{length}" not in text
    short = exported(256, segments=True, window=100)  # a bias is smaller than cuDNN's statistics
    assert "256x256" in short and "__cudnn$fmhaScaleBiasSoftmax" in short


def test_rows_without_segments_are_as_before(gpu):
    text = exported(1024, segments=False)
    assert "__cudnn$fmhaSoftmax" in text and "1024x1024" not in text


def test_where_documents_stay_a_bias(gpu):
    q, *_ = rows(1024)
    assert attention_fused.cudnn_problem(q) == ""
    assert "a bias is smaller" in attention_fused.cudnn_problem(rows(1024, heads=8)[0])
    for machine, reason in (
        ({"capability": "8.0"}, "older than Hopper"),
        ({"cudnn": 90_500}, "older than 9.6"),
        ({"platform": "rocm 60300"}, "other than CUDA"),
    ):
        gpu(**machine)
        assert reason in attention_fused.cudnn_problem(q)
    gpu(capability="10.0")  # Blackwell
    assert attention_fused.cudnn_problem(q) == ""


def test_a_machine_without_a_gpu_has_a_bias():
    assert "without a GPU" in attention_fused.cudnn_problem(rows(1024)[0])
