"""From a checkpoint to a model and its vocabulary, as the run that made it was configured.

A run's directory says everything (`config.gin`), so that the commands which use a model need only
`--checkpoint`. Heavy imports stand inside functions: flags are read before them.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

CONFIG = "config.gin"
PARAMS = ("auto", "raw", "ema")
EXAMPLE = '{"text": "..."}, {"messages": [{"role": "user", "content": "..."}]} or {"tokens": [...]}'
_KEYS = ("tokens", "text", "messages")


class LoadError(ValueError):
    """A checkpoint that cannot be used as asked, or rows that the model cannot read."""


def add_flags(parser: argparse.ArgumentParser) -> Any:
    """The flags of all commands that read a checkpoint; returns their group."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="run directory (its newest good step) or step directory",
    )
    group.add_argument(
        "--params",
        choices=PARAMS,
        default="auto",
        help="the trained parameters (raw), their moving average (ema), or the average where there "
        "is one (auto)",
    )
    return group


def add_row_flags(parser: argparse.ArgumentParser, *, required: bool = True) -> Any:
    """`add_flags` with the flags for files of rows."""
    group = add_flags(parser)
    group.add_argument(
        "--inputs", required=required, metavar="FILE", help="JSON lines, also .gz and .zst"
    )
    group.add_argument("--output", required=required, metavar="FILE", help="JSON lines")
    group.add_argument(
        "--batch_size", type=int, default=8, metavar="N", help="rows at a time (default 8)"
    )
    return group


def default_files(
    flags: argparse.Namespace, *, own: str = "t5x_configs/runs/load_run.gin"
) -> Sequence[str]:
    """The command's own gin file, the configuration of the checkpoint's run, and its vocabulary.

    Raises:
      LoadError: the run has none, and no --gin_file is given in its place.
      FileNotFoundError: there is no checkpoint.
    """
    from launch.run import run_vocabulary
    from trainers.checkpoints import step_dir

    step = step_dir.resolve(flags.checkpoint)
    for folder in (step.parent.parent, step.parent):
        if (folder / CONFIG).exists():
            files = [own, os.fspath(folder / CONFIG)]
            return [*files, *run_vocabulary.gin_files(folder, flags.checkpoint, before=files)]
    if not flags.gin_file:
        raise LoadError(
            f"There is no {CONFIG} beside the checkpoint {step}, so that nothing tells which model it "
            "is of. Give the run's configuration: --gin_file=FILE."
        )
    return [own]


def config_of(checkpoint: str, gin_file: Sequence[str] = ()) -> "RunConfig":
    """The configuration of the run that made a checkpoint, as commands on it read it.

    Args:
      checkpoint: step or run directory.
      gin_file: files that change it.

    Raises:
      LoadError, FileNotFoundError: as `default_files`.
    """
    from launch.config import gin_config

    flags = argparse.Namespace(checkpoint=checkpoint, gin_file=list(gin_file))
    config = gin_config.load(
        flags.gin_file,
        entry="launch.run.load_run:RunConfig",
        unused={"VOCABULARY": "None"},
        untrusted=list(default_files(flags)),
    )
    run: Any = config.entry
    return run()


def vocabulary(*, value: Any) -> Any:
    """Evaluated only when it is called: vocabularies are slow to load, and tokens need none."""
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What gin says of a run that has been trained.

    Attributes:
      model: the linen module.
      vocabulary: returns the SeqIO vocabulary of its data.
      mesh: mesh shape to use the model on.
      rules: name of a rule set in trainers/partitioning.py.
      start_token: what precedes the first token of a document; None for nothing, 'auto' for what is
        recorded with the checkpoint, which is 0 where nothing is.
      add_bos: begin texts with the vocabulary's BOS; None for what the run did.
      chat_template: a jinja file or a name in data/tokenizers/chat_template.py; None for the vocabulary's own.
    """

    model: Any
    vocabulary: Callable[[], Any]
    mesh: Mapping[str, int] | None = None
    rules: str = "fsdp_tp"
    start_token: int | Literal["auto"] | None = "auto"
    add_bos: bool | None = None
    chat_template: str | None = None

    @contextlib.contextmanager
    def load(
        self, checkpoint: str, *, params: str = "auto", rewards: bool = False
    ) -> Iterator["LoadedRun"]:
        """Restores the parameters, verified, and enters the mesh; of an actor and critic those of the actor.

        Args:
          checkpoint: step or run directory.
          params: one of PARAMS.
          rewards: whether it must be of a reward model, which no other command reads.

        Raises:
          LoadError: a model of another kind.
          DamagedCheckpointError, CheckpointMismatchError, FileNotFoundError.
        """
        from model.config import TransformerConfig
        from model.heads.actor_critic import language_model, language_model_params
        from model.heads.reward_model import RewardModel
        from trainers import initialise, partitioning

        if isinstance(self.model, RewardModel) != rewards:
            raise LoadError(
                f"The checkpoint is of a {type(self.model).__name__}: "
                + (
                    "train a reward model with methods/preference/reward_model.gin."
                    if rewards
                    else "it says rewards, and this command reads language models (launch.prepare best_of_n reads it)."
                )
            )
        if not isinstance(self.model.config, TransformerConfig):
            raise LoadError(
                f"The checkpoint is of a {type(self.model).__name__}, and this command reads language "
                "models: a classifier is evaluated by its own run (launch.train)."
            )
        mesh = partitioning.make_mesh(shape=self.mesh)
        rules = partitioning.rules_named(self.rules)
        boxed = initialise.abstract_variables(self.model)["params"]
        rows = partitioning.batch_sharding(mesh, rules)
        shards = mesh.devices.size // rows.shard_shape((mesh.devices.size,))[0]
        partitioning.validate(
            mesh=mesh,
            rules=rules,
            config=self.model.config,
            batch_size=shards,
            length=1,
            boxed_params=boxed,
        )
        abstract = initialise.abstract_params(self.model, mesh, rules)
        values, meta = restore(checkpoint, abstract, params=params)
        values = language_model_params(self.model, values)
        model = language_model(self.model)
        with partitioning.use_mesh(mesh, rules):
            yield LoadedRun(
                config=dataclasses.replace(self, model=model),
                params=values,
                meta=meta,
                row_sharding=rows if mesh.devices.size > 1 else None,
                row_shards=shards,
            )


@dataclasses.dataclass(kw_only=True)
class LoadedRun:
    """A model with its parameters.

    Attributes:
      config: of the run.
      params: restored, on the mesh.
      meta: what the run recorded with the checkpoint.
      row_sharding: of the rows of a batch; None on one device.
      row_shards: a batch must have a multiple of so many rows.
    """

    config: RunConfig
    params: Any
    meta: Mapping[str, Any]
    row_sharding: Any
    row_shards: int

    @property
    def model(self) -> Any:
        return self.config.model

    @property
    def add_bos(self) -> bool:
        """Whether texts begin with BOS."""
        chosen = self.config.add_bos
        return bool(self.meta.get("add_bos", False) if chosen is None else chosen)

    @functools.cached_property
    def vocabulary_or_none(self) -> Any:
        """The vocabulary of the run's data, None where its configuration names none.

        Raises:
          LoadError: it is not the one the model was trained with.
        """
        found = self.config.vocabulary()
        if found is not None:
            self._check(found)
        return found

    @property
    def vocabulary(self) -> Any:
        """The vocabulary of the run's data.

        Raises:
          LoadError: it is not the one the model was trained with, or the run names none.
        """
        if self.vocabulary_or_none is None:
            raise LoadError(
                "The run's configuration sets no VOCABULARY: give tokens in place of texts, or "
                "--gin.VOCABULARY='@vocabularies.byte()' or another in data/tokenizers/vocabularies.py."
            )
        return self.vocabulary_or_none

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All ids that end a continuation; none where the run names no vocabulary, or it no EOS."""
        found = self.vocabulary_or_none
        if found is None:
            return ()
        ids = getattr(found, "eos_ids", None) or (found.eos_id,)
        return tuple(id for id in ids if id not in (None, -1))

    def _check(self, found: Any) -> None:
        from data.stream import rows

        name = f"{type(found).__name__} of {found.vocab_size} entries"
        trained = self.meta.get("vocabulary")
        if trained is not None and trained != rows.vocabulary_digest(found):
            raise LoadError(
                f"The checkpoint was trained with another vocabulary than this {name}: its tokens "
                "would mean other texts. Use the vocabulary of the run (a trained one is kept in its "
                "directory, or found again from the same corpus and settings), or give tokens in place "
                "of texts."
            )
        size = self.model.config.vocab_size
        if found.vocab_size > size:
            raise LoadError(
                f"The vocabulary, {name}, does not fit the model's table of {size} rows."
            )

    @functools.cached_property
    def chat_template(self) -> Any:
        """What turns "messages" into a text: a `data.tokenizers.chat_template.ChatTemplate`.

        Raises:
          LoadError: there is none.
        """
        from launch.run import conversations

        return conversations.template(self.config.chat_template, self.vocabulary)

    def tokens(self, row: Mapping[str, Any], where: str) -> list[int]:
        """The tokens of a row to be continued: its "tokens", or those of its "text" or "messages".

        A text begins with BOS where the run's did, and never with two. "messages" are rendered, with
        the row's "tools" and "documents", up to where the assistant's next turn begins; whether that
        begins with BOS is the template's to say.

        Raises:
          LoadError: it has none or several of them, or they are not what they should be.
        """
        key = self._key(row, where)
        if key == "messages":
            from launch.run import conversations

            return conversations.prompt(self, row, where)
        found = self.encode(row[key], f"{where}: {key!r}")
        return self.after_bos(found) if key == "text" else found

    def scored(self, row: Mapping[str, Any], where: str) -> tuple[list[int], list[int] | None]:
        """The tokens of a row to be scored, and its targets, which follow them; None where all are.

        Targets are the row's "targets", or the assistant's turn that ends its "messages", up to and
        with the token that ends it.

        Raises:
          LoadError: as `tokens` and `encode`, or the template renders the turn in another place.
        """
        if "targets" in row:
            return self.tokens(row, where), self.encode(row["targets"], f"{where}: 'targets'")
        if self._key(row, where) != "messages":
            return self.tokens(row, where), None
        from launch.run import conversations

        return conversations.scored(self, row, where)

    def _key(self, row: Mapping[str, Any], where: str) -> str:
        given = [key for key in _KEYS if key in row]
        if len(given) != 1:
            raise LoadError(
                f'{where}: expected either "tokens", "text" or "messages", as in {EXAMPLE}.'
            )
        return given[0]

    def after_bos(self, ids: list[int]) -> list[int]:
        """Ids of a text after BOS, if texts begin with it and this one does not yet."""
        if not self.add_bos:
            return ids
        if (bos := self.vocabulary.bos_id) in (None, -1):
            raise LoadError("ADD_BOS is set, but the run's vocabulary has no BOS: set it to False.")
        return ids if ids[:1] == [bos] else [bos, *ids]

    def encode(self, value: Any, where: str) -> list[int]:
        """Token ids of a text, or token ids that the model knows."""
        if isinstance(value, str):
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise LoadError(
                    f"{where} is not valid Unicode at character {error.start} (half of a surrogate "
                    "pair). Repair or drop it."
                ) from None
            return list(self.vocabulary.encode(value))
        if not isinstance(value, list) or not all(type(id) is int for id in value):
            raise LoadError(f"{where} is neither a text nor a list of token ids.")
        size = self.model.config.vocab_size
        if wrong := [id for id in value if not 0 <= id < size]:
            raise LoadError(f"{where} holds the id {wrong[0]}, outside the model's {size} rows.")
        return value

    def context(self, tokens: Sequence[int]) -> list[int]:
        """Tokens as the model reads them, after what precedes every document."""
        start = self.config.start_token
        if start == "auto":
            start = self.meta.get("start_token", 0)
        return list(tokens) if start is None else [start, *tokens]

    def batch_size(self, wanted: int, rows: int) -> int:
        """`wanted`, or as many as there are, rounded up to what the mesh divides."""
        if wanted < 1:
            raise LoadError(f"--batch_size={wanted} must be at least 1.")
        return -(-max(1, min(wanted, rows)) // self.row_shards) * self.row_shards


def restore(checkpoint: str, abstract: Any, *, params: str) -> tuple[Any, Mapping[str, Any]]:
    """Parameters onto the shardings of `abstract`, and what the run recorded with them."""
    from trainers.checkpoints import step_dir
    from trainers.checkpoints.restore_params import restore_params

    def read(step: Any) -> tuple[Any, Mapping[str, Any]]:
        recorded = step_dir.read_manifest(step)
        averaged = any(name.startswith("ema_params/") for name in recorded.arrays)
        use_ema = averaged if params == "auto" else params == "ema"
        values = restore_params(step, abstract, use_ema=use_ema)
        return values, step_dir.read_record(step, recorded)["meta"]

    return step_dir.newest_good(checkpoint, read)
