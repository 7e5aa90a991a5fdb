"""A run as its configuration, devices, data and parent determine it, and the state that it starts from."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from etils import epath

from espalier.launch.config import build
from espalier.launch.processes import hosts
from espalier.launch.run import phase
from espalier.model.protocol import adapters_of
from espalier.trainers.batches import Stream, TrainStream
from espalier.trainers.checkpoints import base_step, restore, step_dir
from espalier.trainers.checkpoints.initial import InitialCheckpoint
from espalier.trainers.checkpoints.restore_params import INFERENCE_PART
from espalier.trainers.evaluate import EvalStream
from espalier.trainers.optim.schedules import Span, as_schedule
from espalier.trainers.recipe import Program, Recipe
from espalier.trainers.telemetry import flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """What is known of a run before it has a state: made once, and read by all that prints, restores, trains and records.

    Attributes:
      program: the compiled functions, with the learning rates of this run's span.
      model: the linen module.
      unit, loss_per: what the model reads and its loss is a mean over, see trainers/inputs.py.
      units_per_batch: tokens or images in a global batch, padding included.
      parent: the run that this one continues.
      stream, eval_streams: the training stream and the held-out splits.
      total_steps: updates of the run.
      learning_rates: of each update, and of the one that would follow the last.
      tasks: `data.tasks.summary()`; empty for a run without tasks.
      vocabulary, chat_template: of the tasks, which all sources share; None without tasks.
      identity: the facts that a checkpoint and the run that continues from it must agree on.
      notices: (name, text) of messages on the data.
      of_prompts: whether the policy samples completions of the stream's prompts.
    """

    program: Program
    model: Any
    unit: str
    loss_per: str
    units_per_batch: int
    parent: phase.Parent
    stream: TrainStream
    eval_streams: tuple[EvalStream, ...]
    total_steps: int
    learning_rates: np.ndarray
    tasks: Mapping[str, Any]
    vocabulary: Any
    chat_template: Any
    identity: Mapping[str, Any]
    notices: Sequence[tuple[str, str]]
    of_prompts: bool

    @functools.cached_property
    def flops_per_unit(self) -> float:
        """Model FLOPs of training on one token, or on one image."""
        return self.program.train_flops_per_unit

    @property
    def devices(self) -> list[jax.Device]:
        return list(self.program.mesh.devices.flat)

    def learning_rate(self, updates: int) -> float:
        """Returns the rate of the update that follows so many; past the last one, where TRAIN_STEPS was lowered, the last rate."""
        return float(self.learning_rates[min(updates, len(self.learning_rates) - 1)])

    def row_metrics(self, updates: int, batches: int, units_per_second: float) -> dict[str, float]:
        """Returns learning rate, throughput, utilisation and epochs, as the host knows them, for a row of metrics."""
        # An update uses the rate at the number of updates before it.
        metrics = {"learning_rate": self.learning_rate(max(updates - 1, 0))}
        if units_per_second:
            metrics[f"{self.unit}_per_second"] = units_per_second
            metrics["model_flops_per_second"] = units_per_second * self.flops_per_unit
            mfu = flops.utilisation(units_per_second, self.flops_per_unit, self.devices)
            metrics |= {} if mfu is None else {"mfu": mfu}
        epochs = self.stream.epochs(batches).items()
        return metrics | {f"epochs/{name}": count for name, count in epochs}


def check(program: Program) -> None:
    """Checks what needs no data: the objective's files, memory, and the size of a vocabulary that is to be trained.

    Raises:
      ValueError: a state that the devices cannot hold, before anything is compiled; a table with fewer rows than the
        vocabulary, before any text is read for it.
    """
    program.check_extras()
    need = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.abstract_state))
    devices = list(program.mesh.devices.flat)
    memory = psutil.virtual_memory().total * jax.process_count()
    if devices[0].platform != "cpu":
        statistics = jax.local_devices()[0].memory_stats() or {}
        memory = statistics.get("bytes_limit", need) * len(devices)
    if need > memory:
        raise ValueError(
            f"Parameters and optimiser state need {need / 1e9:,.0f} GB, but there are {memory / 1e9:,.0f} GB on "
            f"{len(devices)} devices: make the model smaller, or use more devices."
        )
    if (running := build.running()) is None:
        return
    from espalier.data.tokenizers import vocabularies

    if running.called_in("VOCABULARY") is vocabularies.sentencepiece:
        # Its other arguments would build the corpus.
        sizes = running.bound_to(vocabularies.sentencepiece, "size", "extra_ids")
        _check_table(program.recipe, sum(sizes.values()))


def resolve(
    program: Program,
    *,
    parent: phase.Parent,
    checkpoints: str | os.PathLike,
    stream: Callable[..., TrainStream],
    tasks: Sequence[Callable[[], Any]],
    eval_stream: Callable[..., EvalStream] | None,
    eval_tasks: Sequence[str] | None,
    total_steps: int | None,
    total_tokens: float | None,
    total_epochs: float | None,
    of_prompts: bool,
) -> ResolvedRun:
    """Registers the tasks, opens the streams and checks them; `launch.train.train` describes the other arguments.

    Args:
      program: the program that will read the data.
      parent: result of `phase.find_parent`; the streams continue at its positions.
      checkpoints: the run's own.
      of_prompts: whether the stream has prompts, whose rows are not the recipe's inputs.

    Raises:
      ValueError: data that match neither the program nor the parent, or would exceed their maximum number of epochs.
      HostsDisagreeError: hosts with other data.
    """
    # The streams are functions that gin names; only what is registered for all of them is asked for here.
    from espalier.data import tasks as registry
    from espalier.data.stream import stream as streams

    recipe = program.recipe
    is_text = recipe.inputs_spec.unit == "tokens"
    for register in tasks:
        register()
    if tasks and is_text:
        digest = registry.vocabulary_digest().get("vocabulary")
        phase.check_vocabulary(checkpoints, parent, digest)
    program.check_extras(registry.vocabulary_digest)
    _check_moving_reference(program, parent)
    if tasks and is_text:
        # Before anything is tokenised; the run may use only some of the tasks.
        sizes = [registry.vocabulary(name).vocab_size for name in registry.sources()]
        _check_table(recipe, min(sizes, default=0))
    opened = stream(positions=parent.positions) if parent.positions else stream()
    if not of_prompts:
        _check_rows(recipe, opened)
    (_check_vocabulary if is_text else _check_images)(recipe, opened)
    if total_tokens is not None:
        total_steps = opened.steps_for_tokens(total_tokens)
    elif total_epochs is not None:
        total_steps = opened.steps_for_epochs(total_epochs)
    assert total_steps is not None  # checked by `train`
    repeats = opened.check_repeats(total_steps)
    names = opened.source_names if eval_tasks is None else tuple(eval_tasks)
    held_out = streams.held_out(eval_stream, names) if eval_stream else ()
    summary = registry.summary() if tasks else {}
    identity = {
        "data_fingerprint": opened.fingerprint,
        "model": dataclasses.asdict(recipe.model.config),
        "seed": recipe.seed,
    }
    if is_text:
        facts = opened.summary()
        # Whether all documents begin with BOS; if so, prompts must too.
        add_bos = registry.add_bos(opened.source_names)
        identity["vocabulary"] = facts["vocabulary"]["digest"]
        identity |= {"add_bos": add_bos, "start_token": facts["start_token"]}
    held = {f"held-out {each.name}": each.fingerprint for each in held_out}
    hosts.check_same("data", {"data": opened.fingerprint, **held})
    program.check_extras(lambda: identity)
    if parent.step >= total_steps:
        raise ValueError(
            f"TRAIN_STEPS = {total_steps}, but INITIAL_SCOPE = 'state' continues at step {parent.step} "
            f"of {parent.path}, so there is nothing to train: raise TRAIN_STEPS."
        )
    program = program.with_span(
        Span(total_steps, parent.learning_rate, parent.step - parent.skipped)
    )
    schedule = as_schedule(program.recipe.learning_rate)
    # A table, because single evaluations would wait for the running step.
    rates = jax.vmap(lambda step: jnp.asarray(schedule(step), jnp.float32))
    first = opened.source_names[0]
    return ResolvedRun(
        program=program,
        model=recipe.model,
        unit=recipe.inputs_spec.unit,
        loss_per=recipe.inputs_spec.loss_per,
        units_per_batch=recipe.units_per_batch,
        parent=parent,
        stream=opened,
        eval_streams=held_out,
        total_steps=total_steps,
        learning_rates=np.asarray(rates(jnp.arange(total_steps + 1))),
        tasks=summary,
        vocabulary=registry.vocabulary(first) if summary else None,
        chat_template=registry.chat_template(first) if summary else None,
        identity=identity,
        of_prompts=of_prompts,
        notices=[
            *(("caps", line) for line in repeats),
            *registry.notices(summary),
            *(line for each in (opened, *held_out) for line in each.notices()),
        ],
    )


def _check_moving_reference(program: Program, parent: phase.Parent) -> None:
    """Checks that moves of the parent's reference are not added to another model, such as the parent's policy."""
    moving = parent.scope == "state" and program.recipe.moving_reference is not None
    checkpoint = getattr(program.stored_extras, "checkpoint", None)  # see FrozenModel
    if moving and checkpoint is not None and parent.path is not None:
        ours = checkpoint.resolve(record=False)
        run = step_dir.folder_of(epath.Path(parent.path))
        begun = checkpoint.recorded(run)
        of_run = step_dir.folder_of(epath.Path(ours.step)) == run
        if of_run if begun is None else begun["arrays"] != ours.arrays:
            raise ValueError(
                f"REFERENCE = {ours.step} is not the model from which the reference of the run that INITIAL_SCOPE = 'state' continues "
                f"has moved: set REFERENCE to the one in {run}/reference.json."
            )


def _check_rows(recipe: Recipe, stream: Stream) -> None:
    for name, ours, theirs in (
        ("batch_size", recipe.batch_size, stream.batch_size),
        ("length", recipe.length, stream.length),
    ):
        if ours != theirs:
            raise ValueError(
                f"The recipe's {name} is {ours}, but the training stream's is {theirs}: bind both to one "
                "macro (BATCH_SIZE, TASK_FEATURE_LENGTHS), as the files in t5x_configs/runs do."
            )


def _check_vocabulary(recipe: Recipe, stream: Stream) -> None:
    """Checks that the embedding has a row for every id: JAX would clip a larger id silently."""
    rows = recipe.model.config.vocab_size
    _check_table(recipe, stream.summary()["vocabulary"]["size"])
    start = stream.summary().get("start_token")
    if isinstance(start, int) and start >= rows:
        raise ValueError(
            f"DOCUMENT_START = {start} is no token: the model's table has {rows} rows, from 0. Set it to the "
            "id of a token of the vocabulary."
        )


def _check_table(recipe: Recipe, size: int) -> None:
    rows = recipe.model.config.vocab_size
    if size > rows:
        raise ValueError(
            f"The data's vocabulary has {size} entries, but the model's table only {rows} rows: set "
            "config.TransformerConfig.vocab_size to at least that (a multiple of 128 is fastest), or "
            "use the model's own vocabulary. (VOCAB_SIZE is both, in models without a table of their own.)"
        )


def _check_images(recipe: Recipe, stream: Stream) -> None:
    wanted = recipe.inputs_spec.arrays(1)["images"].shape[1:]
    shape, classes = stream.batch(0, 0, 1)["images"].shape[1:], stream.summary()["num_classes"]
    if shape != wanted:
        raise ValueError(
            f"The recipe's images are {list(wanted)}, but the training stream's are {list(shape)}: bind "
            "both to IMAGE_SIZE and CHANNELS, as runs/classify.gin does."
        )
    if classes != recipe.model.config.num_classes:
        raise ValueError(
            f"The data have {classes} classes, but the model {recipe.model.config.num_classes}: set "
            "NUM_CLASSES to that of the data."
        )


def restore_start(
    run: ResolvedRun, checkpointer: Any, initial: InitialCheckpoint
) -> tuple[restore.Restored, dict[str, Any]]:
    """Returns the state that a run starts from, and the facts to record with each of its checkpoints.

    Args:
      checkpointer: checkpointer of the run.
      initial: the start of a run without checkpoints of its own.

    Raises:
      ValueError: a parent with another vocabulary or other beginnings of documents, or damaged in a way
        that changes the phase.
      DamagedCheckpointError, CheckpointMismatchError, RunMismatchError, FileNotFoundError, BaseModelError.
    """
    program, identity, parent = run.program, run.identity, run.parent
    start = restore.restore_or_initialise(
        checkpointer,
        program.abstract_state,
        program.init,
        expected_meta=identity,
        initial=initial,
        restart=program.restart,
        extensions=program.recipe.step_extensions,
    )
    check_prompts(run, start)
    if start.source == "initial":
        phase.check_digest(
            "INITIAL_CHECKPOINT_PATH",
            start.path,
            start.meta.get("vocabulary"),
            identity.get("vocabulary"),
        )
        parent = _at_restored_step(parent, start)
    own = _adapter_facts(run, start)
    meta = dict(identity)
    # Export after training needs the files of an imported model; extension needs a mixture's sources.
    hf = start.meta.get("hf", {})
    if hf := {key: hf[key] for key in ("family", "config", "generation_config") if key in hf}:
        meta["hf"] = hf
    if "upcycled" in start.meta:
        meta["upcycled"] = start.meta["upcycled"]
    if record := parent.record():
        meta["initial"] = record
    if initial.computed is not None or start.source == "run":
        meta |= {key: start.meta[key] for key in ("made_of", "merged") if key in start.meta}
    if initial.base_apart:
        meta[base_step.META] = _base(run, start, initial, own)
    if part := getattr(run.model, "inference_part", ""):
        meta[INFERENCE_PART] = part
    return start, meta | own


def _adapter_facts(run: ResolvedRun, start: restore.Restored) -> dict[str, Any]:
    """Returns what checkpoints record of adapters; raises AdapterError if those of the start have other settings."""
    if adapters_of(run.model) is None:
        return {}
    from espalier.model.adapters import adapter

    adapter.check_settings(run.model, start.meta.get("adapters"), start.path)
    return adapter.record(run.model)


def _base(
    run: ResolvedRun, start: restore.Restored, initial: InitialCheckpoint, own: Mapping[str, Any]
) -> Mapping[str, str]:
    """Returns what this run's checkpoints say of the base model that they are without; `own` is of `_adapter_facts`."""
    if start.source == "run":
        return start.meta[base_step.META]  # a run does not change its configuration
    assert start.path is not None  # see InitialCheckpoint.check
    if start.state.ema_params is not None:
        raise ValueError(
            "BASE_APART is without effect on moving averages, which have the base model too: remove Recipe.ema_decay "
            "or Recipe.averaged, or set BASE_APART = False."
        )
    return base_step.frozen(
        start.path,
        run.program.abstract_state.params,
        run.program.mask,
        base_step.added(own),
        use_ema=initial.use_ema,
    )


def _at_restored_step(parent: phase.Parent, start: restore.Restored) -> phase.Parent:
    """Returns the parent with the path of the restored step, which may be older than the newest."""
    if str(start.path) == parent.path:
        return parent
    moved = parent.step != start.step
    if parent.scope == "phase" or parent.data == "continue" or moved:
        raise ValueError(
            f"INITIAL_CHECKPOINT_PATH: {parent.path} is damaged, and {start.path} is at another place "
            "of its data and schedule: give the directory of the step to start from."
        )
    return dataclasses.replace(parent, path=str(start.path))


def check_prompts(run: ResolvedRun, start: restore.Restored) -> None:
    """Raises ValueError unless prompts begin (BOS, start token) like the documents of the parent's training."""
    if not (run.of_prompts or run.loss_per == "pairs") or start.source != "initial":
        return
    for key, macro in (("start_token", "DOCUMENT_START"), ("add_bos", "PROMPT_BOS")):
        ours = run.identity[key]
        theirs = start.meta.get(key, ours)
        if step_dir.begins_otherwise(key, theirs, ours, encodes=run.model.row.encodes):
            raise ValueError(
                f"INITIAL_CHECKPOINT_PATH: documents of {start.path} begin otherwise ({key} {theirs}) than this "
                f"run's prompts ({ours}): set {macro} = {theirs}."
            )
