"""Loads a model and its vocabulary from a checkpoint, as the run that wrote it has recorded them.

Commands need only `--checkpoint`: the run's directory has its model (model.json) and vocabulary as data, which may come from
anyone. Its config.gin, which calls the functions that it names, is not read.
Heavy imports are inside functions: flags are parsed before them.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from espalier.common.ranges import AxisSize, Count
from espalier.launch import cli
from espalier.launch.load.loaded_run import EXAMPLE, LoadedRun, LoadError

if TYPE_CHECKING:  # flags are parsed before gin is imported
    from espalier.launch.config.build import Configuration

__all__ = ["EXAMPLE", "LoadError", "LoadedRun"]  # commands import these from this module

OWN = "t5x_configs/runs/load_run.gin"  # of every command that reads a model
_ENTRY = "espalier.launch.load.load_run:RunConfig"
_UNUSED = {"VOCABULARY": "None"}
PARAMS = ("auto", "raw", "ema")
CacheDtype = Literal["int8", "bfloat16", "float16", "float32"]  # of cached keys and values
WeightsDtype = Literal["int8"]  # of the kernels of projections
SpecialTokens = Literal["texts", "everywhere", "nowhere"]


def add_flags(parser: argparse.ArgumentParser, *, required: bool = True) -> Any:
    """Adds the flags of all commands that read a checkpoint; returns their group."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint",
        required=required,
        metavar="DIR",
        help="the model: a run directory (its newest good step), a step directory, or the folder of a Hugging Face checkpoint",
    )
    group.add_argument(
        "--params",
        choices=PARAMS,
        default="auto",
        help="which parameters are used: the trained ones (raw), their moving average (ema), or the average where there "
        "is one (auto, the default)",
    )
    return group


def add_adapter_flag(group: Any) -> None:
    """Adds the flag --adapter, for launch/load/side_by_side.py."""
    group.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="DIR",
        help="run with adapters of this checkpoint, or a folder of convert --to_adapter; repeatable: the checkpoint is loaded "
        "once, and the results of each follow one another",
    )


def add_weights_flag(group: Any) -> None:
    """Adds the flag --weights_dtype, of commands that only use the model: it sets the macro WEIGHTS_DTYPE."""
    group.add_argument(
        "--weights_dtype",
        action="append",
        dest=cli.BINDINGS,
        type="WEIGHTS_DTYPE={!r}".format,
        metavar="int8",
        help="store the weights of attention, MLPs and experts as int8, with a scale for each output channel; the default is the "
        "type of the checkpoint",
    )


def add_trust_flag(parser: Any) -> None:
    """Adds the flag --trust_config."""
    parser.add_argument(
        "--trust_config",
        action="store_true",
        help="also use the whole config.gin of the run, such as its data: reading it calls the functions that it names",
    )


def add_row_flags(parser: argparse.ArgumentParser, *, required: bool = True) -> Any:
    """Adds the flags of `add_flags` and the flags for files of rows."""
    group = add_flags(parser)
    add_adapter_flag(group)
    add_weights_flag(group)
    group.add_argument(
        "--inputs",
        required=required,
        metavar="FILE",
        help="read rows from this file of JSON lines, also .gz or .zst",
    )
    group.add_argument(
        "--output", required=required, metavar="FILE", help="write rows to this file of JSON lines"
    )
    group.add_argument(
        "--batch_size",
        type=int,
        default=8,
        metavar="N",
        help="number of rows in a batch (default 8)",
    )
    return group


def default_files(flags: argparse.Namespace) -> Sequence[str]:
    """Returns `files_of` the flags --checkpoint and --gin_file."""
    return files_of(flags.checkpoint, flags.gin_file)


def command(
    doc: str,
    name: str,
    run: Callable[[cli.Start], Any],
    add_flags: Callable[[argparse.ArgumentParser], None],
    *,
    files: Callable[[argparse.Namespace], Sequence[str]] = default_files,
    without_model: bool = False,
) -> cli.Main:
    """Returns the function `main` of a command that reads a model: its `Start` makes the `RunConfig`.

    Args:
      doc, name: help text and name of the command.
      run: does the work, from flags and a `Start`.
      add_flags: adds the command's own flags to a parser.
      files: returns the gin files that are read by default, from flags.
      without_model: whether the command may need no model.
    """
    unused = {**_UNUSED, **({"MODEL": "None"} if without_model else {})}
    return cli.gin_command(
        doc,
        _ENTRY,
        command=name,
        extra_flags=add_flags,
        run=run,
        unused=unused,
        default_files=files,
        needs_file=not without_model,
    )


def start_of(
    words: Sequence[str],
    add_flags: Callable[[argparse.ArgumentParser], None],
    *,
    files: Callable[[argparse.Namespace], Sequence[str]] = default_files,
) -> cli.Start:
    """Returns the `Start` of the words of a `command` that is under way in another process."""
    from espalier.launch.config import gin_config

    flags, bindings = cli.read_gin_flags(words, "worker", add_flags)
    paths = list(filter(None, ",".join(flags.gin_search_paths).split(",")))
    own = {"unused": _UNUSED, "defaults": list(files(flags))}
    return cli.Start(
        flags, gin_config.load(flags.gin_file, bindings, paths, entry=_ENTRY, **own), words
    )


def trusting_command(
    doc: str,
    name: str,
    run: Callable[[cli.Start], Any],
    add_flags: Callable[[argparse.ArgumentParser], None],
    *,
    entry: str,
    own: str,
) -> cli.Main:
    """Returns the function `main` of a command that reads a run's data too, from config.gin with --trust_config.

    Args:
      doc, name, run, add_flags: see `command`.
      entry: function that gin configures.
      own: gin file of the command.
    """

    def whole(flags: argparse.Namespace) -> Sequence[str]:
        trust = flags.trust_config
        return whole_files(flags.checkpoint, flags.gin_file, trust_config=trust, own=own)

    options = {"command": name, "extra_flags": add_flags, "run": run, "default_files": whole}
    return cli.gin_command(doc, entry, **options)


def files_of(checkpoint: str | None, gin_file: Sequence[str] = ()) -> Sequence[str]:
    """Returns the gin files of a command that reads a model: its own, the run's model, and the run's vocabulary.

    Args:
      checkpoint: step or run directory; None for a command that needs none.
      gin_file: gin files of the user.

    Raises:
      LoadError: the run has no model.json, and no --gin_file replaces it.
      FileNotFoundError: there is no checkpoint.
    """
    from espalier.launch.config import model_file
    from espalier.launch.load import hf_checkpoint
    from espalier.launch.run import run_vocabulary
    from espalier.trainers.checkpoints import step_dir

    if checkpoint is None:
        return [OWN]
    if hf_checkpoint.is_hf(checkpoint):
        folder, _ = hf_checkpoint.recorded(checkpoint)
        return [os.path.join(folder, model_file.NAME), OWN, *run_vocabulary.gin_files(folder)]
    step = step_dir.resolve(checkpoint)
    if (model := file_of_run(step, model_file.NAME)) is None:
        if gin_file:
            return [OWN]
        raise LoadError(
            f"There is no {model_file.NAME} beside the checkpoint {step}, so that its model is unknown. If you trust the "
            "run's configuration, give it: --gin_file=RUN/config.gin."
        )
    # The command's own file comes second: the author of a run sets none of its macros.
    return [model, OWN, *run_vocabulary.gin_files(os.path.dirname(model), checkpoint)]


def whole_files(
    checkpoint: str, gin_file: Sequence[str], *, trust_config: bool, own: str
) -> Sequence[str]:
    """Returns the gin files of a command that needs more of a run than its model, such as its data.

    Args:
      checkpoint: step or run directory.
      gin_file: gin files of the user, which configure the data unless `trust_config`.
      trust_config: whether the run's config.gin may be read, which calls the functions that it names.
      own: gin file of the command.

    Raises:
      LoadError: `trust_config` and `gin_file` are both missing, or the run has no config.gin.
      FileNotFoundError: there is no checkpoint.
    """
    from espalier.launch.load import hf_checkpoint
    from espalier.launch.run.model_record import CONFIG
    from espalier.trainers.checkpoints import step_dir

    is_hf = hf_checkpoint.is_hf(checkpoint)
    if is_hf or not trust_config:
        if gin_file:
            return [own if file == OWN else file for file in files_of(checkpoint, gin_file)]
        if is_hf:
            raise LoadError(
                f"{checkpoint} is a Hugging Face checkpoint, which describes no data: give those of a run with its vocabulary, "
                "--gin_file=RUN/config.gin, or configure data and recipe yourself, --gin_file=FILE."
            )
        raise LoadError(
            f"The data of {checkpoint} are described in its {CONFIG}, and reading that calls the functions that it names. "
            "If you trust its author, add --trust_config; or configure data and recipe yourself: --gin_file=FILE."
        )
    config = file_of_run(step_dir.resolve(checkpoint), CONFIG)
    if config is None:
        raise LoadError(f"There is no {CONFIG} beside the checkpoints of {checkpoint}.")
    return [own, config]  # with the run's vocabulary, see gin_source.read


def config_of(checkpoint: str, gin_file: Sequence[str] = ()) -> "RunConfig":
    """Returns the configuration of a checkpoint's run; see `configuration_of`."""
    run: Any = configuration_of(checkpoint, gin_file).entry
    return run()


def configuration_of(checkpoint: str, gin_file: Sequence[str] = ()) -> "Configuration":
    """Returns the configuration of a checkpoint's run, as commands load it; its entry makes the `RunConfig`.

    Args:
      checkpoint: step or run directory.
      gin_file: gin files that change it.

    Raises:
      LoadError, FileNotFoundError: see `files_of`.
    """
    from espalier.launch.config import gin_config

    return gin_config.load(
        list(gin_file),
        entry=_ENTRY,
        unused=_UNUSED,
        defaults=list(files_of(checkpoint, gin_file)),
    )


def file_of_run(step: Any, name: str) -> str | None:
    """Returns the path of a file in the run that a step directory belongs to; None without one."""
    from espalier.trainers.checkpoints import step_dir

    path = os.path.join(step_dir.files_of_run(step), name)
    return path if os.path.isfile(path) else None


def place(checkpoint: str) -> str:
    """Returns the absolute path of the step, or of the Hugging Face checkpoint, that commands read.

    Raises:
      FileNotFoundError: there is no checkpoint.
    """
    from espalier.launch.load import hf_checkpoint
    from espalier.trainers.checkpoints import step_dir

    if hf_checkpoint.is_hf(checkpoint):
        return os.path.abspath(checkpoint)
    return os.fspath(step_dir.resolve(checkpoint))


def vocabulary(*, value: Any) -> Any:
    """Returns `value`, which gin makes only at this call: a vocabulary loads slowly, and rows of tokens need none."""
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The configuration of a trained run.

    Attributes:
      model: the linen module.
      vocabulary: returns the SeqIO vocabulary of its data.
      mesh: mesh shape to use the model on.
      rules: name of a rule set in trainers/partitioning.py.
      start_token: the token before the first token of a document; None for no such token, 'auto' for the
        token recorded with the checkpoint, or else 0.
      add_bos: whether to begin texts with the vocabulary's BOS; None for the setting in training.
      chat_template: a jinja file or a name in data/tokenizers/chat_template.py; None for the vocabulary's own.
      special_tokens: where spellings of special tokens are special tokens: in 'texts' to continue alone, 'everywhere',
        also in contents of messages, or 'nowhere', for texts of others. What a chat template itself writes always is.
      weights_dtype: 'int8' to quantise the kernels of projections while they are read (model/transforms/int8_weights.py); None for
        the dtype of the parameters.
    """

    model: Any
    vocabulary: Callable[[], Any]
    mesh: Mapping[str, AxisSize] | None = None
    rules: str = "fsdp_tp"
    start_token: Count | Literal["auto"] | None = "auto"
    add_bos: bool | None = None
    chat_template: str | None = None
    special_tokens: SpecialTokens = "texts"
    weights_dtype: WeightsDtype | None = None

    def __post_init__(self) -> None:
        if not hasattr(self.model, "output"):
            raise LoadError(
                f"MODEL = {reprlib.repr(self.model)} is no model: set it to one, such as @transformer.Transformer()."
            )

    @functools.cached_property
    def converses(self) -> bool:
        """Whether there is a chat template, of the configuration or of the vocabulary."""
        own = getattr(self.vocabulary(), "chat_template", None)
        return self.chat_template is not None or own is not None

    @contextlib.contextmanager
    def load(
        self,
        checkpoint: str,
        *,
        params: str = "auto",
        rewards: bool = False,
        of_base: bool = False,
        encoder_decoders: bool = False,
    ) -> Iterator[LoadedRun]:
        """Context manager: restores and verifies the parameters (of an actor-critic, the actor), and enters the mesh.

        Args:
          checkpoint: step or run directory.
          params: one of PARAMS.
          rewards: whether a reward model is expected instead of a language model.
          of_base: whether the checkpoint may be of the base model, without the model's adapters.
          encoder_decoders: whether the command also reads encoder-decoders.

        Raises:
          LoadError: the checkpoint has a model of another kind.
          AdapterError: it has adapters of other settings.
          Int8WeightsError: no weight of the model can be int8, as `weights_dtype` asks.
          DamagedCheckpointError, CheckpointMismatchError, FileNotFoundError.
        """
        from espalier.model import rows
        from espalier.model.adapters.adapter import check_settings
        from espalier.model.protocol import inference_model, inference_params
        from espalier.trainers import initialise, partitioning

        if (self.model.output == "rewards") != rewards:
            remedy = "train a reward model with methods/preference/reward_model.gin."
            if not rewards:
                remedy = "it outputs rewards, and this command reads language models (espalier prepare best_of_n reads it)."
            raise LoadError(f"The checkpoint is of a {type(self.model).__name__}: {remedy}")
        if self.model.row.encodes and not encoder_decoders:
            raise LoadError(
                f"The checkpoint is of an {type(self.model).__name__}, and this command reads decoders alone: "
                "espalier generate, espalier score, espalier serve, espalier evaluate loss, seqio and ranks, espalier lm_eval, espalier influence and "
                "espalier merge search read encoder-decoders."
            )
        if self.model.row is rows.IMAGES:
            raise LoadError(
                f"The checkpoint is of a {type(self.model).__name__}, and this command reads language "
                "models: a classifier is evaluated by its own run (espalier train)."
            )
        mesh = partitioning.make_mesh(shape=self.mesh)
        rules = partitioning.rules_named(self.rules)
        row_sharding = partitioning.batch_sharding(mesh, rules)
        shards = mesh.devices.size // row_sharding.shard_shape((mesh.devices.size,))[0]
        sizes: dict[str, Any] = {"config": self.model.config, "batch_size": shards, "length": 1}
        dtype = self.weights_dtype
        restored = restoring(
            checkpoint, self.model, params=params, of_base=of_base, weights_dtype=dtype
        )
        with restored as place:
            boxed = initialise.abstract_variables(self.model)["params"]
            partitioning.validate(mesh=mesh, rules=rules, boxed_params=boxed, **sizes)
            abstract = initialise.abstract_params(self.model, mesh, rules, weights_dtype=dtype)
            values, meta = place(abstract)
        check_settings(self.model, meta.get("adapters"), checkpoint)
        values = inference_params(self.model, values)
        with partitioning.use_mesh(mesh, rules):
            yield LoadedRun(
                config=dataclasses.replace(self, model=inference_model(self.model)),
                params=values,
                meta=meta,
                row_sharding=row_sharding if mesh.devices.size > 1 else None,
                row_shards=shards,
            )


@contextlib.contextmanager
def restoring(
    checkpoint: str,
    model: Any,
    *,
    params: str,
    of_base: bool = False,
    weights_dtype: WeightsDtype | None = None,
) -> Iterator[Callable[[Any], tuple[Any, Mapping[str, Any]]]]:
    """Context manager: yields `restore` as a function of `abstract`; files of Hugging Face are read from the beginning on.

    With `of_base`, adapters that the checkpoint lacks are left out. With `weights_dtype`, `abstract` has kernels of this dtype.
    """
    from espalier.launch.load import hf_checkpoint
    from espalier.model.adapters import adapter
    from espalier.model.transforms import int8_weights
    from espalier.trainers.checkpoints import base_step, step_dir

    if hf_checkpoint.is_hf(checkpoint):
        with hf_checkpoint.restoring(
            checkpoint, model, params=params, weights_dtype=weights_dtype
        ) as restore:
            yield restore
        return
    from espalier.trainers.checkpoints.restore_params import restore_params  # imports Orbax

    def place(abstract: Any) -> tuple[Any, Mapping[str, Any]]:
        def read(step: Any) -> tuple[Any, Mapping[str, Any]]:
            recorded = step_dir.read_manifest(step)
            there = base_step.entries(step, recorded, params)
            own = base_step.added(adapter.record(model))
            wanted = base_step.present(abstract, there, own) if of_base else abstract
            finish = None
            if weights_dtype is not None:
                wanted, finish = int8_weights.reading(wanted, model.config.storage_dtype)
            use_ema = recorded.use_ema(params)
            values = restore_params(step, wanted, use_ema=use_ema, finish=finish)
            return values, step_dir.read_record(step, recorded)["meta"]

        return step_dir.newest_good(checkpoint, read)

    yield place


def restore(
    checkpoint: str, model: Any, abstract: Any, *, params: str
) -> tuple[Any, Mapping[str, Any]]:
    """Returns a model's parameters on the shardings of `abstract`, and the run's record of them."""
    with restoring(checkpoint, model, params=params) as place:
        return place(abstract)
