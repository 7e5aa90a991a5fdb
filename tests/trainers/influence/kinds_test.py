"""Taps of every kind of layer against autodiff in float64: low-rank factors, adapters, and an encoder-decoder."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.adapters import adapter
from espalier.model.adapters.lora import Lora
from espalier.model.attention import Attention
from espalier.model.config import TransformerConfig
from espalier.model.low_rank.lowrank import Factorisation, LowRankExpertDense, factorised
from espalier.model.mlp import GatedMlp
from espalier.model.moe.moe import MoeMlp
from espalier.model.mov.molora import MoLora
from espalier.model.t5.encoder_decoder import EncoderDecoder
from espalier.model.transformer import Block, Transformer
from espalier.trainers import initialise
from espalier.trainers.checkpoints import state_tree
from espalier.trainers.influence import (
    conjugate,
    documents,
    files,
    fit,
    kronecker,
    queries,
    scores,
    sites,
)
from espalier.trainers.influence.backward import backward
from espalier.trainers.influence.consumers import Covariances, Gradients
from espalier.trainers.scoring.scoring import Row

F64 = "float64"
CONFIG = TransformerConfig(
    **dict(vocab_size=13, num_layers=1, embed_dim=6, num_heads=1, mlp_dim=5),
    **dict(dtype=F64, param_dtype=F64, layer_pattern=("full_nope",)),
)
ROWS = [
    Row(context=[0], targets=[3, 4, 5, 1, 2], encoder_inputs=[4, 4, 9]),
    Row(context=[0], targets=[8, 1], encoder_inputs=[7]),
]


pytestmark = pytest.mark.usefixtures("float64")


def lora():
    make = functools.partial(Lora, layers=(r".*attention/query",), rank=2, param_dtype=F64)
    return functools.partial(Attention, adapters=adapter.named(lora=make))


def low_rank():
    factorisation = Factorisation(rank=3, rank_rule="absolute")
    return functools.partial(GatedMlp, dense=factorised(factorisation=factorisation))


def low_rank_experts():
    dense = functools.partial(
        LowRankExpertDense,
        factorisation=Factorisation(rank=3, rank_rule="absolute", layers=(".*",)),
    )
    return functools.partial(MoeMlp, num_experts=2, top_k=1, expert_dense=dense)


MODELS = {
    "factors and adapters": (
        lambda: Transformer(
            config=CONFIG, block=functools.partial(Block, mlp=low_rank(), attention=lora())
        ),
        ("mlp", "adapters"),
        {"mlp/down/v": (3, 6), "query/adapter_lora/lora_a": (6, 2)},
    ),
    "factors of experts": (
        lambda: Transformer(config=CONFIG, block=functools.partial(Block, mlp=low_rank_experts())),
        ("mlp",),
        {"mlp/gate/u": (6, 3)},
    ),
    "an encoder-decoder": (
        lambda: EncoderDecoder(config=CONFIG, tie_embeddings=True),
        ("all", "head"),
        {"encoder/layers/block_0/mlp/up/kernel": (6, 5), "cross_attention/key/kernel": (6, 6)},
    ),
}


def drawn(model):
    """Parameters of some size."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    r = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(r.normal(size=x.shape) * 0.5), nn.meta.unbox(shapes)["params"]
    )


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_equal_autodiff(kind):
    make, modules, known = MODELS[kind]
    model = make()
    params = drawn(model)
    chosen = sites.select(model, params, modules)
    for name, shape in known.items():
        (site,) = (s for path, s in chosen.items() if path.endswith(name))
        assert (site.inputs, site.outputs) == shape
    arrays = documents.columns(ROWS, [0, 1], 2, 6)
    if not model.row.encodes:
        arrays = {n: x for n, x in arrays.items() if not n.startswith("encoder")}

    def loss(params, batch):
        table = jax.nn.log_softmax(conjugate.logits_of(model, params, batch))
        picked = jnp.take_along_axis(table, batch["decoder_target_tokens"][..., None], -1)[..., 0]
        return -(picked * batch["decoder_loss_weights"]).sum()

    @jax.jit
    def both(params, batch):
        tapped = [
            backward(model, chosen, consumer, params, {}, batch)[0]
            for consumer in (Gradients(F64), Covariances(1, F64))
        ]
        rows = [
            jax.grad(loss)(params, jax.tree.map(lambda x, b=b: x[b : b + 1], batch)) for b in (0, 1)
        ]
        return *tapped, rows

    tapped, covariances, rows = both(params, arrays)
    # The router of experts computes in float32.
    tolerance = 2e-6 if "experts" in kind else 1e-10
    for path, site in chosen.items():
        for b, row in enumerate(rows):
            got = jnp.take(tapped[path], b, axis=len(site.scan))
            want = site.matrix(state_tree.flatten(row))
            np.testing.assert_allclose(got, want, atol=tolerance, err_msg=path)
        encoder = (
            "encoder/" in path or "cross_attention/key" in path or "cross_attention/value" in path
        )
        tokens = 4 if encoder else 7  # that each side reads
        assert np.sum(covariances[path]["count"]) == tokens


def test_rows_that_a_batch_lacks_are_no_tokens_of_the_encoder(tmp_path):
    """Factors and scores of 9 and 16 documents in batches of 8 are those of documents that are read alone."""
    model = EncoderDecoder(config=CONFIG, tie_embeddings=True)
    params = drawn(model)
    chosen = sites.select(model, params, ("attention",))
    r = np.random.default_rng(1)

    def text(least):
        return r.integers(1, 13, r.integers(least, 9)).tolist()

    rows = [Row(context=[0], targets=text(2), encoder_inputs=text(1)) for _ in range(16)]
    settings = fit.FitSettings(modules=("attention",), factor_dtype=F64)
    readers = {size: fit.Reader(model=model, params=params, batch_size=size) for size in (8, 1)}
    for count in (9, 16):
        own, stages = rows[:count], {}
        for size, reader in readers.items():
            folder = tmp_path / f"{count}_{size}"
            fit.fit(reader, folder, lambda own=own: own, settings)
            curvature = fit.read_curvature(folder, chosen, "ekfac", kronecker.Damping(0.1))
            ready = queries.prepare(reader, chosen, rows[:2], curvature, rank=None, dtype=F64)
            scored = scores.score(reader, chosen, ready, own, dtype=F64)
            stages[size] = files.read(folder / "covariances")[0]
            stages[size]["scores"] = np.array([one.scores for one in scored])
        for name, want in stages[1].items():
            atol = 1e-10 * np.abs(want).max()
            np.testing.assert_allclose(stages[8][name], want, rtol=0, atol=atol, err_msg=name)


def test_rows_that_a_batch_lacks_are_of_no_expert_of_the_encoder():
    mixture = functools.partial(MoeMlp, num_experts=2, top_k=1)
    model = EncoderDecoder(config=CONFIG, block=functools.partial(Block, mlp=mixture))
    params = drawn(model)
    chosen = {p: s for p, s in sites.select(model, params).items() if p.startswith("encoder")}
    arrays = documents.columns(ROWS, [0, 1], 4, 6)
    run = jax.jit(lambda p, x: backward(model, chosen, Covariances(1, F64), p, {}, x)[0])
    for own in run(params, arrays).values():
        assert own["count"].sum() == sum(len(row.encoder_inputs) for row in ROWS)


def test_adapters_of_which_only_the_routers_have_taps_are_refused():
    make = functools.partial(MoLora, layers=(r".*attention/query",), num_experts=2, rank=2)
    block = functools.partial(
        Block, attention=functools.partial(Attention, adapters=adapter.named(lora=make))
    )
    model = Transformer(config=CONFIG, block=block)
    params = nn.meta.unbox(initialise.abstract_variables(model)["params"])
    with pytest.raises(sites.SiteError, match="leave out .*lora_a.*with a tap: .*router/kernel"):
        sites.select(model, params, ("adapters",))
    assert [*sites.select(model, params, (".*router",))] == [
        "layers/block_0/attention/query/adapter_lora/router/kernel"
    ]
