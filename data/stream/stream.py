"""The training and evaluation streams: batches as a pure function of (seed, step).

    SeqIO task -> token cache -> row plan -> schedule -> order -> batch(step, lo, hi)

Any step is computed by arithmetic, independent of what was read before. Each host requests the rows
of the global batch that it needs, so neither the number of hosts nor the mesh changes the content
of a batch. The step is the whole state of a stream.
"""

import dataclasses
import functools
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from espalier.common.ranges import Amount, Count, Positive, Seed, Size, check_choice
from espalier.data.cache import pool, store
from espalier.data.cache.in_place import ReadCache
from espalier.data.stream import mixing, plan, rows, schedule
from espalier.data.stream.row_stream import EvalStream
from espalier.data.stream.train_stream import Phases, Positions, Stream

AnyStream = TypeVar("AnyStream", bound=Stream)
AnyEvalStream = TypeVar("AnyEvalStream", bound=EvalStream)
Opened = TypeVar("Opened")

_UNIMAX_EPOCHS = 4.0  # repeated that often, tokens are nearly worth new ones
# Settings of the order of rows, which the class of the stream takes.
_OF_ORDER = ("batch_size", "seed", "interleaving", "on_cap", "positions")
# Settings of all held-out streams, of all training streams, and those with which a mixture's tasks are weighed.
HELD_OUT = (
    *("batch_size", "split", "cache_dir", "changed_cache", "verify_cache"),
    *("read_cache", "use_cached", "workers"),
)
TRAINING = (*HELD_OUT, "seed", "interleaving", "max_epochs", "on_cap", "positions")
WEIGHTS = ("weights", "temperature", "max_tokens", "phases")


class NoSplitError(ValueError):
    """A task has no such split, for example because no document is held out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """How a stream reads the sources of a mixture, whatever their rows are; `make_stream` describes the fields.

    Raises:
        ValueError: settings contradict each other.
    """

    batch_size: Size
    seed: Seed = 0
    split: str = "train"
    weights: mixing.Weights = "rates"
    temperature: Positive = 1.0
    max_tokens: Amount | None = None
    unimax_tokens: Amount | None = None
    unimax_epochs: Positive | None = None
    phases: Phases | None = None
    interleaving: schedule.Interleaving = "error_diffusion"
    max_epochs: schedule.MaxEpochs | None = None
    on_cap: schedule.OnCap = "error"
    positions: Positions | None = None
    cache_dir: str | os.PathLike | None = None
    changed_cache: store.Changed = "refuse"
    verify_cache: bool = True
    workers: Size | None = None
    read_cache: ReadCache = "auto"
    use_cached: bool = False

    def __post_init__(self):
        check_choice("weights", self.weights, mixing.Weights)
        check_choice("read_cache", self.read_cache, ReadCache)
        if self.phases is not None and (self.weights != "rates" or self.temperature != 1.0):
            raise ValueError("phases set the weights: remove the settings weights and temperature.")
        if self.max_tokens is not None and self.weights != "tokens":
            raise ValueError("max_tokens caps token counts: it needs weights='tokens'.")
        if (self.unimax_tokens, self.unimax_epochs) != (None, None) and self.weights != "unimax":
            raise ValueError("unimax_tokens and unimax_epochs need weights='unimax'.")
        if self.weights == "unimax" and self.temperature != 1.0:
            raise ValueError("temperature has no meaning with weights='unimax': remove it.")

    def open_cache(self, task: Any) -> store.Cache:
        """Opens the token cache of a SeqIO task, see `task_cache.open_task_cache`."""
        from espalier.data import tasks
        from espalier.data.cache import task_cache  # a stream over caches needs no tasks

        if self.use_cached:
            tasks.open_cached(task.name)
        with pool.limited(self.workers):
            return task_cache.open_task_cache(
                task,
                self.split,
                cache_dir=self.cache_dir,
                changed=self.changed_cache,
                verify=self.verify_cache,
                read=self.read_cache,
                use_cached=self.use_cached,
            )

    def shares_of(self, counts: Mapping[str, int]) -> dict[str, float]:
        """Returns {task: its weight} by the numbers of their tokens."""
        if self.weights == "unimax":
            budget = sum(counts.values()) if self.unimax_tokens is None else self.unimax_tokens
            epochs = _UNIMAX_EPOCHS if self.unimax_epochs is None else self.unimax_epochs
            return mixing.unimax(counts, budget, epochs)
        return mixing.tempered(counts, self.temperature, self.max_tokens)


def with_settings(
    settings: type, *names: str, **defaults: Any
) -> Callable[[Callable[..., Opened]], Callable[..., Opened]]:
    """Gives a function that opens a stream parameters of settings; it is called with them as one object, `settings`.

    Args:
      settings: the dataclass of the settings.
      names: its fields that become parameters; all if none is named.
      defaults: of the parameters, where they are not those of the fields.
    """
    every = inspect.signature(settings).parameters.values()
    added = [
        p.replace(default=defaults.get(p.name, p.default))
        for p in every
        if p.name in (names or [p.name])
    ]

    def decorate(opener: Callable[..., Opened]) -> Callable[..., Opened]:
        @functools.wraps(opener)
        def opened(**arguments: Any) -> Opened:
            given = {p.name: arguments.pop(p.name) for p in added if p.name in arguments}
            return opener(settings=settings(**{**defaults, **given}), **arguments)

        signature = inspect.signature(opener)
        own = [p for p in signature.parameters.values() if p.name != "settings"]
        full = signature.replace(parameters=[*own, *added])
        of_opener: Any = opener  # gin's own runtime asks the function that is wrapped
        made: Any = opened
        of_opener.__signature__ = made.__signature__ = full
        types = {p.name: p.annotation for p in full.parameters.values()}
        made.__annotations__ = {**types, "return": full.return_annotation}
        return made

    return decorate


@with_settings(StreamSettings, *TRAINING, *WEIGHTS, "unimax_tokens", "unimax_epochs")
def make_stream(
    *,
    mixture_or_task_name: str,
    task_feature_lengths: Mapping[str, Size],
    settings: StreamSettings,
    packing: plan.Packing = "best_fit",
    long_documents: plan.LongDocuments = "split",
    inputs_prefix: Sequence[Count] = (),
    cross_document_attention: bool = False,
    start_token: Count = 0,
) -> Stream:
    """Returns the training stream of a SeqIO mixture or task; builds missing token caches.

    A task can mask or weight its tokens by an output feature 'loss_weights', declared as
    `seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False, dtype=tf.float32)`. It holds the
    loss weight of each target token, including BOS and EOS. Without this feature all weights are 1.

    Args:
        mixture_or_task_name: name registered with SeqIO. A mixture's rates are shares of training
            *tokens* (SeqIO's own sampler treats them as shares of examples).
        task_feature_lengths: {'targets': tokens per row}; with 'inputs' as well, rows are for an
            encoder-decoder.
        batch_size: rows of the global batch.
        seed: seed of the order of rows.
        split: split of the tasks.
        weights: 'rates' uses the mixture's rates, 'tokens' the number of tokens of each task,
            'unimax' equal shares, but for tasks so small that they would be read too often.
        temperature: weights are raised to 1 / temperature before they are normalised.
        max_tokens: with weights='tokens', an upper limit on the token count of each task.
        unimax_tokens: with weights='unimax', the tokens that the run reads; None for as many as the
            tasks have together.
        unimax_epochs: with weights='unimax', how often a task is read at most; 4 if None.
        phases: replaces the mixture's rates: ((first step, {task: share of tokens}), ...), the
            first at step 0. Tasks missing from a phase are not read in it.
        interleaving: 'error_diffusion' holds every source within one row of its share at any time;
            'random' orders the rows of each period at random, for comparison.
        packing: 'best_fit', 'concat' or 'examples'; see `data.stream.plan.make_plan`.
        long_documents: 'split' into several segments, 'truncate' or 'drop' documents that are longer than a row;
            counted in `summary()`.
        inputs_prefix: ids before the inputs of every example, such as the virtual tokens of prompt tuning.
        cross_document_attention: make each row one segment, so that its documents see each other.
        start_token: token that the model reads before the first token of every document.
        max_epochs: maximum number of epochs: one number for every source, or {task: number}.
            Reading by earlier phases counts.
        on_cap: effect of a run that would exceed `max_epochs`: an 'error' before the first step, a
            warning ('warn'), or 'redistribute', which excludes the source from the step that would
            exceed its cap and gives its share to the other sources of the phase, in proportion.
        positions: `Stream.positions` of an earlier stream, at which each source continues; None
            starts at the beginning.
        cache_dir: the root of all caches; $ESPALIER_CACHE or ~/.cache/espalier if None.
        changed_cache: what to do if a task has changed since its cache was built: 'refuse',
            'build' a second cache, or 'replace' the first.
        verify_cache: check every byte of the caches against its checksum.
        workers: processes that build missing caches; None for one on each core.
        read_cache: how a cache in a store is read: 'copy' it to this machine, read it 'in_place' by the parts that rows need,
            or 'auto': in place if it has more than 10 GB or half of the free disk.
        use_cached: open the one cache of each task that there is, without reading its source, which may have changed; several
            caches are an error.

    Raises:
        ValueError: the data cannot be streamed with these settings.
    """
    return open_mixture(
        mixture_or_task_name,
        settings,
        _planner(settings, task_feature_lengths, packing, long_documents, inputs_prefix),
        Stream,
        cross_document_attention=cross_document_attention,
        start_token=start_token,
    )


@with_settings(StreamSettings, *HELD_OUT, split="validation")
def make_eval_stream(
    *,
    task: str,
    task_feature_lengths: Mapping[str, Size],
    settings: StreamSettings,
    packing: plan.Packing = "best_fit",
    long_documents: plan.LongDocuments = "split",
    inputs_prefix: Sequence[Count] = (),
    cross_document_attention: bool = False,
    start_token: Count = 0,
) -> EvalStream:
    """Returns the evaluation stream of a SeqIO task: every row once, in a fixed random order.

    In the order of the plan, which begins with the pieces of long documents, the first batches
    (EVAL_STEPS) would be a biased sample. Mixtures are evaluated task by task, as in SeqIO.
    `make_stream` describes the arguments.

    Raises:
        NoSplitError: the task has no such split.
        ValueError: the data cannot be streamed with these settings.
    """
    return open_held_out(
        task,
        settings,
        _planner(settings, task_feature_lengths, packing, long_documents, inputs_prefix),
        EvalStream,
        cross_document_attention=cross_document_attention,
        start_token=start_token,
    )


def held_out(open_stream: Callable[..., Opened], tasks: Sequence[str]) -> tuple[Opened, ...]:
    """Returns the evaluation streams of the tasks that have held-out data; prints which have none.

    `open_stream` is called with (task=).
    """
    opened = []
    for name in tasks:
        try:
            opened.append(open_stream(task=name))
        except NoSplitError as error:
            # Only the first line: gin appends the location of the call.
            print(f"Not evaluated: {str(error).splitlines()[0]}", file=sys.stderr)
    return tuple(opened)


def open_mixture(
    mixture_or_task_name: str,
    settings: StreamSettings,
    plan_source: Callable[[str, store.Cache], rows.Source],
    stream_class: Callable[..., AnyStream],
    **of_rows: Any,
) -> AnyStream:
    """Returns a stream over the sources with positive weight in a mixture.

    Args:
        mixture_or_task_name: name registered with SeqIO.
        settings: what all kinds of rows have in common.
        plan_source: (task name, opened token cache) -> source with planned rows.
        stream_class: class of the stream.
        **of_rows: further arguments of `stream_class`.

    Raises:
        ValueError: weights cannot be normalised, or a cache cannot be opened.
    """
    tasks, weight_of = mixing.find_tasks(mixture_or_task_name)
    known = tuple(task.name for task in tasks)
    phases, max_epochs = settings.phases, settings.max_epochs
    if phases is not None:
        phases = mixing.checked_phases(phases, known)
    else:
        where = f"mixture {mixture_or_task_name!r}"
        read = mixing.normalised(
            weight_of, known, where
        )  # a rate of 0 excludes a task from any weights
        if settings.weights == "rates":
            rates = mixing.tempered(weight_of, settings.temperature)
            phases = [(0, mixing.normalised(rates, known, where))]
    wanted = read if phases is None else {name for _, shares in phases for name in shares}
    sources = [
        plan_source(task.name, settings.open_cache(task)) for task in tasks if task.name in wanted
    ]
    if isinstance(max_epochs, Mapping):  # caps may name tasks that no phase reads
        unused = set(known) - set(wanted)
        max_epochs = {name: cap for name, cap in max_epochs.items() if name not in unused}
    if phases is None:
        counts = {source.name: source.plan.tokens() for source in sources}
        phases = ((0, settings.shares_of(counts)),)
    order = {name: getattr(settings, name) for name in _OF_ORDER}
    return stream_class(sources, phases, max_epochs=max_epochs, **order, **of_rows)


def open_held_out(
    task: str,
    settings: StreamSettings,
    plan_source: Callable[[str, store.Cache], rows.Source],
    stream_class: Callable[..., AnyEvalStream],
    **of_rows: Any,
) -> AnyEvalStream:
    """Returns the stream of the evaluation split of one task; see `open_mixture`.

    Raises:
        NoSplitError: the task has no such split.
        ValueError: the name is the name of a mixture.
    """
    tasks, _ = mixing.find_tasks(task)
    if [member.name for member in tasks] != [task]:
        raise ValueError(
            f"{task!r} is a mixture: evaluate its tasks one by one, with task = one of "
            f"{', '.join(member.name for member in tasks)}."
        )
    if settings.split not in tasks[0].splits:
        raise NoSplitError(
            f"Task {task!r} has no split {settings.split!r}; it has {', '.join(sorted(tasks[0].splits))}. Hold "
            "documents out (VALIDATION_FRACTION above 0, or VALIDATION_FILES; for pairs "
            "PAIRS_VALIDATION_FRACTION or PAIRS_VALIDATION), or do not evaluate the task."
        )
    source = plan_source(task, settings.open_cache(tasks[0]))
    return stream_class(source, batch_size=settings.batch_size, **of_rows)


def _planner(
    settings: StreamSettings,
    feature_lengths: Mapping[str, int],
    packing: str,
    long_documents: str,
    inputs_prefix: Sequence[int],
) -> Callable[[str, store.Cache], rows.Source]:
    return functools.partial(
        rows.plan_source,
        feature_lengths=feature_lengths,
        packing=packing,
        long_documents=long_documents,
        inputs_prefix=inputs_prefix,
        verify=settings.verify_cache,
    )
