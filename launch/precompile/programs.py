"""The programs that `precompile` compiles, with the shapes and shardings of their arguments; nothing is allocated.

train        one update, as the training loop runs it.
prefill      reads a batch of prompts into caches and chooses the first token, as generation does.
decode       the loop over new tokens that follows; its end depends on the tokens, so its costs are those of one token.
covariances  one batch of the first stage of EK-FAC (trainers/influence/fit.py).
squares      one batch of its third stage; the second is a program of one device for each matrix, and on TPUs runs on their hosts.
scores       one batch of documents, scored for queries of low rank (trainers/influence/scores.py).

The rows of a batch are the recipe's, and its row length is the length of a prompt or a document.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from espalier.launch.precompile.settings import Options
from espalier.model import axes
from espalier.model.flops import mean_keys
from espalier.model.kv_cache.base import CachePolicy
from espalier.model.transforms import layer_stack
from espalier.trainers import initialise, partitioning
from espalier.trainers.decoding.decode import Loop, advance, begin
from espalier.trainers.decoding.prefill import prefill
from espalier.trainers.decoding.settings import Settings
from espalier.trainers.influence import sites, spread
from espalier.trainers.influence.consumers import Consumer, Covariances, Scores, Squares
from espalier.trainers.influence.documents import Reader
from espalier.trainers.influence.queries import Compression
from espalier.trainers.recipe import Program, Recipe

Kind = Literal["train", "prefill", "decode", "covariances", "squares", "scores"]
INFLUENCE = ("covariances", "squares", "scores")
# Axes of a cache's arrays by the end of their names, see model/kv_cache/slots.py.
_CACHE_AXES = {
    "_BKSH": (axes.BATCH, axes.ACT_KV_HEADS),
    "_BKS": (axes.BATCH, axes.ACT_KV_HEADS),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """A jitted function and its abstract arguments, to be lowered within the program's mesh.

    Attributes:
      donated: index of the argument whose memory the results reuse; None for none.
      model_flops: FLOPs of the model for one execution on all chips; None if they are not counted.
      mean_keys: mean number of keys per query, over rows and layers.
      open_loops: number of loops that end by data, of which one trip is counted.
      per: what one execution, or one trip, is.
    """

    function: Any
    arguments: Sequence[Any]
    donated: int | None
    model_flops: float | None
    mean_keys: float
    open_loops: int = 0
    per: Literal["step", "token", "batch"] = "step"


def work(kind: Kind, program: Program, policy: CachePolicy, options: Options) -> Work:
    """Returns the program of this kind; raises ValueError for a model that has none."""
    if kind == "train":
        return train(program)
    if kind in INFLUENCE:
        return _influence(kind, program, options)
    return _generation(program, policy, options, decodes=kind == "decode")


def train(program: Program) -> Work:
    """Returns the work of one update, without losses by data source: they need the data, and cost next to nothing."""
    recipe = program.recipe
    return Work(
        function=program.steps(0).train,
        arguments=(program.abstract_state, recipe.abstract_batch(program.batch_sharding)),
        donated=0,
        model_flops=program.train_flops_per_unit * recipe.units_per_batch,
        mean_keys=_mean_keys(recipe),
    )


def _generation(program: Program, policy: CachePolicy, options: Options, *, decodes: bool) -> Work:
    recipe, mesh, rules = program.recipe, program.mesh, program.rules
    rows, length = recipe.batch_size, recipe.length
    if recipe.language_model.row.encodes:
        raise ValueError("--program=prefill and decode compile decoders without an encoder alone.")
    model = layer_stack.unrolled(recipe.model)
    settings = Settings(max_new_tokens=options.max_new_tokens, eos_ids=(0,))
    dtype = options.weights_dtype
    params = initialise.abstract_params(model, mesh, rules, weights_dtype=dtype)

    def read(params: Any, tokens_BT: Any, lengths_B: Any, active_B: Any, seeds_B: Any) -> Loop:
        room = max(options.max_new_tokens - 1, 1)
        own: dict[str, Any] = dict(cache_dtype=options.cache_dtype, chunk=options.prefill_chunk)
        logits_BV, caches = prefill(model, params, policy, tokens_BT, lengths_B, room=room, **own)
        keys_B = jax.vmap(jax.random.key)(seeds_B)
        return begin(logits_BV, caches, lengths_B, active_B, keys_B, None, settings)

    def row(dtype: Any, *more: int) -> Any:
        sharding = program.batch_sharding
        return jax.ShapeDtypeStruct((rows, *more), dtype, sharding=sharding)

    prompts = (row(jnp.int32, length), row(jnp.int32), row(jnp.bool_), row(jnp.uint32))
    tokens = rows * length
    # Logits are computed for the last token alone.
    decoder: Any = recipe.model
    flops = tokens * decoder.hidden_flops(recipe.inputs_spec.arrays(1))
    if not decodes:
        return Work(
            function=jax.jit(read),
            arguments=(params, *prompts),
            donated=None,
            model_flops=flops,
            mean_keys=_mean_keys(recipe),
            per="batch",
        )
    with partitioning.use_mesh(mesh, rules):
        loop = jax.eval_shape(read, params, *prompts)
    shardings = _loop_shardings(loop, program)

    def generate(params: Any, loop: Loop, until: Any, ended_B: Any) -> tuple[Loop, Any]:
        loop = advance(model, params, policy, loop, until, ended_B, settings)
        return loop, (loop.step, loop.done_B, loop.decoded)

    whole = NamedSharding(mesh, PartitionSpec())
    return Work(
        function=jax.jit(generate, donate_argnums=1, out_shardings=(shardings, whole)),
        arguments=(
            *(params, initialise.with_shardings(loop, shardings)),
            *(jax.ShapeDtypeStruct((), jnp.int32, sharding=whole), row(jnp.bool_)),
        ),
        donated=1,
        model_flops=None,  # of one token it depends on what the caches hold
        mean_keys=0.0,
        open_loops=1,
        per="token",
    )


def _loop_shardings(loop: Any, program: Program) -> Any:
    """Returns the shardings of a generation's state: rows over the batch's axes, caches also over heads."""

    def sharding(path: Any, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = str(path[-1])
        names = next((v for end, v in _CACHE_AXES.items() if name.endswith(end)), (axes.BATCH,))
        if len(names) > 1 and leaf.shape[1] == 1:  # slots that all heads share
            names = names[:1]
        spec = partitioning.mesh_spec(names[: leaf.ndim], program.rules)
        return NamedSharding(program.mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, loop)


def _influence(kind: Kind, program: Program, options: Options) -> Work:
    recipe = program.recipe
    model, rows, length = recipe.language_model, recipe.batch_size, recipe.length
    params = initialise.abstract_params(model, program.mesh, program.rules)
    chosen = sites.select(model, params, options.modules)
    reader = Reader(model=model, params=None, batch_size=rows, sharding=program.batch_sharding)

    def column(dtype: Any, *more: int) -> Any:
        return jax.ShapeDtypeStruct((rows, *more), dtype, sharding=program.batch_sharding)

    names = ("input_tokens", "target_tokens", "segment_ids")
    batch: Mapping[str, Any] = {
        **{f"decoder_{name}": column(jnp.int32, length) for name in names},
        "decoder_loss_weights": column(jnp.float32, length),
        "document_ids": column(jnp.int32),
    }
    whole = NamedSharding(program.mesh, PartitionSpec())
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
    consumer: Consumer = Covariances(options.blocks)
    inputs: dict[str, Any] = {}
    if kind == "squares":
        zeros = consumer.zeros
        sums = {
            p: jax.eval_shape(lambda site=site: zeros(site, 1, 1)) for p, site in chosen.items()
        }
        inputs = {p: {"qa": own["a"], "qs": own["s"]} for p, own in sums.items()}
        consumer = Squares(options.blocks)
    if kind == "scores":
        compress = Compression(options.rank, "bfloat16")
        for path, site in chosen.items():
            shape = (*site.scan, options.queries, *site.stack, site.inputs, site.outputs)
            gradient = jax.ShapeDtypeStruct(shape, jnp.float32)
            inputs[path] = jax.eval_shape(compress, gradient)
        consumer = Scores(options.queries)
    inputs = initialise.with_shardings(inputs, spread.shardings(program.mesh, inputs))
    return Work(
        function=reader.compiled(chosen, consumer),
        arguments=(params, inputs, batch, None if kind == "scores" else key),  # labels of documents
        donated=None,
        model_flops=None,  # products of matrices, not the model's passes, are most of the work
        mean_keys=_mean_keys(recipe),
        per="batch",
    )


def _mean_keys(recipe: Recipe) -> float:
    """Returns the keys per query, on average over rows and layers; 0 without attention."""
    if recipe.inputs_spec.length is None:
        return 0.0
    windows = [layer.kind.window for layer in recipe.model.layer_settings()]
    return sum(mean_keys(recipe.length, window) for window in windows) / len(windows)
