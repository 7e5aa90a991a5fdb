"""Makes one mixture of experts of dense models that were trained on from one seed, or of copies of one model.

Example, of a seed's run and two runs that started from it:

  python -m launch.upcycle --method=bam --experts runs/seed runs/code runs/law --to=runs/bam
  python -m launch.upcycle --method=btx --experts runs/seed runs/code runs/law --to=runs/btx --top_k=2

With btx (arXiv 2403.07816) FFNs become experts and all else is averaged; with bam (arXiv 2408.08274) attentions do too.
The table that is printed says of every parameter whether it was copied, averaged or drawn. What is written is a run
directory that every command takes as --checkpoint, and training as INITIAL_CHECKPOINT_PATH, with methods/btx.gin or
methods/bam.gin after the dense run's files. Arrays are read and written a layer at a time.
"""

if __name__ == "__main__":
    from launch import cli

    def add_flags(parser):
        from launch import upcycle

        upcycle.add_flags(parser)

    def default_files(flags):
        from launch import upcycle

        return upcycle.default_files(flags)

    def start_run(start):
        from launch import upcycle

        upcycle.run(start(), start.flags)

    raise SystemExit(
        cli.main(
            __doc__,
            entry="launch.load_run:RunConfig",
            command="upcycle",
            extra_flags=add_flags,
            run=start_run,
            default_files=default_files,
            unused={"VOCABULARY": "None"},
        )
    )

import argparse
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from launch import gin_config, load_run, run_vocabulary
from launch.import_weights import new_directory
from launch.load_run import CONFIG, RunConfig
from model.mlp import GatedMlp
from model.surgery import upcycle as surgery
from model.surgery.upcycle import Mixture, Piece, UpcycleError
from model.transformer import block_of
from trainers import manifest, state_tree, step_dir, stream_checkpoint
from trainers.array_files import StoredArray
from trainers.manifest import Block, DamagedCheckpointError, Manifest
from trainers.stream_checkpoint import StreamedArray

METHODS = ("btx", "bam")
_RELATED = 0.1  # least correlation of embeddings; those of other seeds have none
_ROWS = 4096  # of them that are compared


def add_flags(parser: argparse.ArgumentParser) -> None:
    models = parser.add_argument_group("models")
    models.add_argument("--method", required=True, choices=METHODS, help="what becomes experts")
    models.add_argument(
        "--experts",
        required=True,
        nargs="+",
        metavar="DIR",
        help="runs or steps, the seed among them; their order is that of the experts",
    )
    models.add_argument(
        "--copies", type=int, default=1, metavar="N", help="of each (sparse upcycling of one model)"
    )
    models.add_argument(
        "--params", choices=load_run.PARAMS, default="auto", help="see launch.score"
    )
    models.add_argument("--to", required=True, metavar="DIR", help="run directory to be made")
    models.add_argument(
        "--unrelated",
        action="store_true",
        help="takes models whose embeddings have nothing in common",
    )
    mixture = parser.add_argument_group("mixture")
    mixture.add_argument("--top_k", type=int, default=1, metavar="K", help="FFNs a token uses")
    mixture.add_argument(
        "--renormalise", action="store_true", help="weights of the chosen FFNs sum to 1"
    )
    mixture.add_argument(
        "--shared_kv", action="store_true", help="of bam: one set of keys and values, the mean"
    )
    mixture.add_argument(
        "--attention_top_k", type=int, metavar="K", help="of bam: attentions a token mixes (all)"
    )
    mixture.add_argument(
        "--router_std", type=float, default=0.02, metavar="S", help="of routers' draw (0.02)"
    )
    mixture.add_argument("--router_seed", type=int, default=0, metavar="N", help="of that draw")


def default_files(flags: argparse.Namespace) -> Sequence[str]:
    """The configuration of the first model's run."""
    first = argparse.Namespace(**vars(flags), checkpoint=flags.experts[0])
    return load_run.default_files(first)


def run(config: RunConfig, flags: argparse.Namespace) -> None:
    """The command.

    Raises:
      UpcycleError, ConvertError, DamagedCheckpointError, FileNotFoundError.
    """
    if flags.method == "btx" and (flags.shared_kv or flags.attention_top_k is not None):
        raise UpcycleError("--shared_kv and --attention_top_k are of --method=bam.")
    sources = [_Dense(path, flags.params) for path in flags.experts for _ in range(flags.copies)]
    if len(sources) < 2:
        raise UpcycleError("one model is no mixture: give --experts of several, or --copies=N.")
    _check_vocabularies(sources)
    if not flags.unrelated:
        _check_related(sources)
    dense = config.model
    mlp = block_of(dense, 0).mlp(config=dense.config, name="mlp")
    if not isinstance(mlp, GatedMlp):
        raise UpcycleError(f"experts are gated MLPs, and the dense model has {type(mlp).__name__}.")
    names = [source.name for source in sources]
    with new_directory(flags.to) as folder:
        text = sources[0].config + "\n".join(["", *_bindings(flags, len(sources)), ""])
        pathlib.Path(folder, CONFIG).write_text(text, encoding="utf-8")
        target = _parameters(os.path.join(folder, CONFIG), flags.gin_file)
        mixture = Mixture(
            experts=len(sources),
            kv_heads=dense.config.kv_heads,
            attention=flags.method == "bam",
            shared_kv=flags.shared_kv,
            router_std=flags.router_std,
            seed=flags.router_seed,
        )
        shapes = {name: tuple(leaf.shape) for name, leaf in target.items()}
        pieces = surgery.plan(shapes, [(x.name, x.shapes) for x in sources], mixture)
        scanned = dense.config.scan_layers
        arrays = {
            f"params/{x.path}": _streamed(x, target[x.path].dtype, sources, scanned=scanned)
            for x in pieces
        }
        meta = {**sources[0].kept_meta(), "upcycled": {"method": flags.method, "experts": names}}
        stream_checkpoint.save(os.path.join(folder, step_dir.CHECKPOINTS), arrays, meta=meta)
        run_vocabulary.copy(sources[0].folder, folder)
    print("\n".join([*surgery.table(pieces, names), f"written to {flags.to}"]))


class _Dense:
    """A dense model's checkpoint: shapes, and arrays that are read when they are needed."""

    def __init__(self, path: str, params: str):
        self.name = path
        self._step = epath.Path(step_dir.resolve(path))
        recorded: Manifest = step_dir.read_manifest(self._step)
        if problems := manifest.check_files(self._step, recorded.files):
            raise DamagedCheckpointError(self._step, problems)
        self.meta: Mapping[str, Any] = step_dir.read_record(self._step, recorded)["meta"]
        averaged = any(name.startswith("ema_params/") for name in recorded.arrays)
        use_ema = averaged if params == "auto" else params == "ema"
        self._root = "ema_params/" if use_ema else "params/"
        self.shapes = {
            name.removeprefix(self._root): tuple(entry.shape)
            for name, entry in recorded.arrays.items()
            if name.startswith(self._root)
        }
        if not self.shapes:
            raise UpcycleError(f"{path} has no {self._root.rstrip('/')}: use --params=raw.")
        folder = self._step.parent
        self.folder = folder.parent if folder.name == step_dir.CHECKPOINTS else folder

    @property
    def config(self) -> str:
        return pathlib.Path(self.folder, CONFIG).read_text(encoding="utf-8")

    def open(self, path: str) -> StoredArray:
        return StoredArray(self._step, self._root + path)

    def kept_meta(self) -> dict[str, Any]:
        keys = ("vocabulary", "add_bos", "start_token")
        return {key: self.meta[key] for key in keys if key in self.meta}


def _check_vocabularies(sources: Sequence[_Dense]) -> None:
    first = sources[0]
    for other in sources[1:]:
        if other.meta.get("vocabulary") != first.meta.get("vocabulary"):
            raise UpcycleError(
                f"{other.name} was trained with another vocabulary than {first.name}: the same ids would "
                "stand for other words. Experts come from one seed and its vocabulary."
            )


def _check_related(sources: Sequence[_Dense]) -> None:
    """Branches of one seed keep much of its embeddings; weights of others do not line up, whatever their shapes."""
    first = sources[0]
    table = "token_embed/embedding"
    if table not in first.shapes:
        return
    count = min(_ROWS, first.shapes[table][0])
    rows = first.open(table).read(rows=(0, count)).astype(np.float64).ravel()
    for other in dict.fromkeys(sources[1:]):
        if other.shapes.get(table) != first.shapes[table]:
            continue  # the plan names it
        theirs = other.open(table).read(rows=(0, count)).astype(np.float64).ravel()
        found = float(np.corrcoef(rows, theirs)[0, 1])
        if not found > _RELATED:
            raise UpcycleError(
                f"{other.name} and {first.name} do not come from one seed: their embeddings correlate by "
                f"{found:.2f}, so that averages of the two mean nothing. --unrelated takes them all the same."
            )


def _bindings(flags: argparse.Namespace, experts: int) -> list[str]:
    """What makes the first model's configuration that of the mixture."""
    lines = ["# Of launch.upcycle.", "from model import mlp", "from model import moe"]
    lines += [
        "from model import transformer",
        "transformer.Block.mlp = @moe.experts_of()",
        "moe.experts_of.mlp = @mlp.GatedMlp",
        "moe.experts_of.moe = @moe.MoeMlp",
        f"moe.MoeMlp.num_experts = {experts}",
        f"moe.MoeMlp.top_k = {flags.top_k}",
        f"moe.MoeMlp.renormalise = {flags.renormalise}",
    ]
    if flags.method == "bam":
        lines += [
            "from model import attention",
            "from model import moa",
            "transformer.Block.attention = @moa.experts_of()",
            "moa.experts_of.attention = @attention.Attention",
            "moa.experts_of.moa = @moa.MixtureOfAttention",
            f"moa.MixtureOfAttention.num_experts = {experts}",
            f"moa.MixtureOfAttention.top_k = {flags.attention_top_k}",
            f"moa.MixtureOfAttention.shared_kv = {flags.shared_kv}",
        ]
    return lines


def _parameters(config: str, files: Sequence[str]) -> state_tree.Flat:
    """Shapes and dtypes of the parameters of the model that a configuration says.

    Args:
      config: made of one that came with a checkpoint.
      files: the user's own, which may import what that may not by itself.
    """
    import flax.linen as nn

    from trainers import initialise

    loaded: Any = gin_config.load(
        files,
        entry="launch.load_run:RunConfig",
        unused={"VOCABULARY": "None"},
        untrusted=["t5x_configs/runs/load_run.gin", config],
    ).entry
    variables = initialise.abstract_variables(loaded().model)
    return state_tree.flatten(nn.meta.unbox(variables["params"]))


def _streamed(
    piece: Piece, dtype: Any, sources: Sequence[_Dense], *, scanned: bool
) -> StreamedArray:
    """The array as it is written, stacked layers one by one."""
    by_layer = scanned and piece.path.startswith("layers/") and piece.origin != "drawn"

    def blocks() -> Iterator[Block]:
        whole = (0,) * len(piece.shape)
        if piece.origin == "drawn":
            yield whole, piece.make([]).astype(dtype)
            return
        stored = [source.open(piece.path) for source in sources]
        if not by_layer:
            yield whole, piece.make([array.read() for array in stored]).astype(dtype)
            return
        for layer in range(piece.shape[0]):
            parts = [array.read(rows=(layer, layer + 1)) for array in stored]
            yield (layer, *whole[1:]), piece.make(parts).astype(dtype)

    chunk = (1, *piece.shape[1:]) if by_layer else piece.shape
    return StreamedArray(piece.shape, np.dtype(dtype), chunk, blocks)
