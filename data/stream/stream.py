"""The training and evaluation streams: batches as a pure function of (seed, step).

    SeqIO task -> token cache -> row plan -> schedule -> order -> batch(step, lo, hi)

Any step is found by arithmetic, whatever was read before. Hosts ask for the rows of the global
batch that they need, so neither their number nor the mesh changes what a batch holds, and the whole
state of a stream is the step.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from data.cache import store
from data.stream import mixing, plan, repeats, rows, schedule
from data.stream.eval_stream import EvalStream
from data.stream.train_stream import Phases, Positions, Stream

AnySource = TypeVar("AnySource", bound=rows.Source)


class NoSplitError(ValueError):
    """A task has no such split, as where no document is held out."""


def make_stream(
    *,
    mixture_or_task_name: str,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    seed: int = 0,
    split: str = "train",
    weights: mixing.Weights = "rates",
    temperature: float = 1.0,
    max_tokens: int | None = None,
    phases: Phases | None = None,
    interleaving: schedule.Interleaving = "error_diffusion",
    packing: plan.Packing = "best_fit",
    long_documents: plan.LongDocuments = "split",
    cross_document_attention: bool = False,
    start_token: int = 0,
    max_epochs: repeats.MaxEpochs | None = None,
    on_cap: repeats.OnCap = "error",
    positions: Positions | None = None,
    cache_dir: str | os.PathLike | None = None,
    changed_cache: store.Changed = "refuse",
    verify_cache: bool = True,
) -> Stream:
    """The training stream of a SeqIO mixture or task; token caches that are missing are built.

    A task masks or weighs its tokens by an output feature 'loss_weights', declared as
    `seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False, dtype=tf.float32)`: one number per
    target token, BOS and EOS included, which becomes its weight in the loss. Without it all are 1.

    Args:
        mixture_or_task_name: registered with SeqIO. A mixture's rates are taken as the shares of
            training *tokens* of its tasks (SeqIO's own sampler takes them as shares of examples).
        task_feature_lengths: {'targets': tokens per row}; with 'inputs' as well, the rows are those
            of an encoder-decoder.
        batch_size: rows of the global batch.
        seed: of the order of rows.
        split: of the tasks.
        weights: 'rates' takes the mixture's rates, 'tokens' the number of tokens of each task.
        temperature: raises the weights to 1 / temperature before they are normalised.
        max_tokens: with weights='tokens', tasks count as having no more tokens than this.
        phases: in place of the mixture's rates, ((first step, {task: share of tokens}), ...), the
            first from step 0 on. Tasks left out of a phase are not read in it.
        interleaving: 'error_diffusion' keeps every source within one row of its share at any time;
            'random' orders the rows of each period at random, for comparison.
        packing: 'best_fit', 'concat' or 'examples'; see `data.stream.plan.make_plan`.
        long_documents: 'split' into several segments, or 'truncate'; counted in `summary()`.
        cross_document_attention: make each row one segment, so that its documents see each other.
        start_token: what the model reads before the first token of every document.
        max_epochs: how often a source may be read at most: a number, or {task: number} for some. What
            earlier phases have read of it counts.
        on_cap: what becomes of a run that would read a source more often: an 'error' before its first
            step, a warning ('warn'), or 'redistribute': from the step on that would pass the cap the
            other sources of the phase share what the source had, pro rata.
        positions: go on in the order of each source where another stream stopped, as its
            `Stream.positions` says; None begins at the beginning.
        cache_dir: the root of all caches; $ESPALIER_CACHE or ~/.cache/espalier if None.
        changed_cache: what to do where a task has changed since its cache was built: 'refuse',
            'build' a second cache, or 'replace' the first.
        verify_cache: check every byte of the caches against its checksum.

    Raises:
        ValueError: what cannot be streamed, before anything is read.
    """
    mixture = open_mixture(
        mixture_or_task_name,
        _language_modelling(task_feature_lengths, packing, long_documents),
        split=split,
        weights=weights,
        temperature=temperature,
        max_tokens=max_tokens,
        phases=phases,
        max_epochs=max_epochs,
        cache_dir=cache_dir,
        changed=changed_cache,
        verify=verify_cache,
    )
    return Stream(
        mixture.sources,
        mixture.phases,
        batch_size=batch_size,
        seed=seed,
        cross_document_attention=cross_document_attention,
        start_token=start_token,
        interleaving=interleaving,
        max_epochs=mixture.max_epochs,
        on_cap=on_cap,
        positions=positions,
    )


def make_eval_stream(
    *,
    task: str,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    split: str = "validation",
    packing: plan.Packing = "best_fit",
    long_documents: plan.LongDocuments = "split",
    cross_document_attention: bool = False,
    start_token: int = 0,
    cache_dir: str | os.PathLike | None = None,
    changed_cache: store.Changed = "refuse",
    verify_cache: bool = True,
) -> EvalStream:
    """The held-out stream of one SeqIO task: every row once, in a fixed order of no meaning.

    Plans begin with the pieces of long documents, so their own order would make a first part of the
    batches (EVAL_STEPS) a biased sample.

    Mixtures are evaluated task by task, as SeqIO does. Arguments as for `make_stream`.

    Raises:
        NoSplitError: the task has no such split.
        ValueError: what cannot be streamed.
    """
    source = open_held_out(
        task,
        _language_modelling(task_feature_lengths, packing, long_documents),
        split=split,
        cache_dir=cache_dir,
        changed=changed_cache,
        verify=verify_cache,
    )
    return EvalStream(
        source,
        batch_size=batch_size,
        cross_document_attention=cross_document_attention,
        start_token=start_token,
    )


def held_out(
    open_stream: Callable[..., EvalStream], tasks: Sequence[str]
) -> tuple[EvalStream, ...]:
    """The evaluation streams of those tasks that hold something out; says which do not."""
    opened = []
    for name in tasks:
        try:
            opened.append(open_stream(task=name))
        except NoSplitError as error:
            # The first line only: gin appends where it was called from.
            print(f"Not evaluated: {str(error).splitlines()[0]}", file=sys.stderr)
    return tuple(opened)


@dataclasses.dataclass(frozen=True)
class Mixture(Generic[AnySource]):
    """What `Stream` needs of a mixture, opened: see there."""

    sources: list[AnySource]
    phases: Phases
    max_epochs: repeats.MaxEpochs | None


def open_mixture(
    mixture_or_task_name: str,
    plan_source: Callable[[str, store.Cache], AnySource],
    *,
    split: str,
    weights: mixing.Weights = "rates",
    temperature: float = 1.0,
    max_tokens: int | None = None,
    phases: Phases | None = None,
    max_epochs: repeats.MaxEpochs | None = None,
    **cache_settings: Any,
) -> Mixture[AnySource]:
    """Opens and plans the sources that have weight in a mixture; arguments as for `make_stream`.

    Args:
        plan_source: makes a source of a task's name and its opened cache.
        **cache_settings: of `data.cache.task_cache.open_task_cache`.
    """
    tasks, weight_of = mixing.find_tasks(mixture_or_task_name)
    known = tuple(task.name for task in tasks)
    if weights not in mixing.WEIGHTS:
        raise ValueError(f"weights={weights!r} is none of {', '.join(map(repr, mixing.WEIGHTS))}.")
    if phases is not None and (weights != "rates" or temperature != 1.0):
        raise ValueError("phases give the weights themselves: leave weights and temperature out.")
    if max_tokens is not None and weights != "tokens":
        raise ValueError("max_tokens caps token counts: it needs weights='tokens'.")
    if phases is not None:
        phases = mixing.checked_phases(phases, known)
    elif weights == "rates":
        rates = mixing.tempered(weight_of, temperature)
        where = f"mixture {mixture_or_task_name!r}"
        phases = [(0, mixing.normalised(rates, known, where))]
    wanted = known if phases is None else {name for _, shares in phases for name in shares}
    sources = [
        plan_source(task.name, _open_cache(task, split, **cache_settings))
        for task in tasks
        if task.name in wanted
    ]
    if isinstance(max_epochs, Mapping):  # a mixture's caps may stay where a phase leaves some out
        left_out = set(known) - set(wanted)
        max_epochs = {name: cap for name, cap in max_epochs.items() if name not in left_out}
    if phases is None:
        counts = {source.name: source.plan.tokens() for source in sources}
        phases = ((0, mixing.tempered(counts, temperature, max_tokens)),)
    return Mixture(sources, phases, max_epochs)


def open_held_out(
    task: str,
    plan_source: Callable[[str, store.Cache], AnySource],
    *,
    split: str,
    **cache_settings: Any,
) -> AnySource:
    """Opens and plans the split of one task that is evaluated; arguments as for `open_mixture`.

    Raises:
        NoSplitError: the task has no such split.
        ValueError: it is a mixture.
    """
    tasks, _ = mixing.find_tasks(task)
    if [found.name for found in tasks] != [task]:
        raise ValueError(
            f"{task!r} is a mixture: evaluate its tasks one by one, as task = each of "
            f"{', '.join(found.name for found in tasks)}."
        )
    if split not in tasks[0].splits:
        raise NoSplitError(
            f"Task {task!r} has no split {split!r}; it has {', '.join(sorted(tasks[0].splits))}. Hold "
            "documents out (VALIDATION_FRACTION above 0, or VALIDATION_FILES; of pairs "
            "PAIRS_VALIDATION_FRACTION or PAIRS_VALIDATION), or leave the task out of the evaluation."
        )
    return plan_source(task, _open_cache(tasks[0], split, **cache_settings))


def _open_cache(task, split: str, **cache_settings: Any) -> store.Cache:
    from data.cache import task_cache  # brings SeqIO, which a stream over caches does not need

    return task_cache.open_task_cache(task, split, **cache_settings)


def _language_modelling(
    feature_lengths: Mapping[str, int], packing: str, long_documents: str
) -> Callable[[str, store.Cache], rows.Source]:
    def plan_source(name: str, opened: store.Cache) -> rows.Source:
        return rows.plan_source(
            name, opened, feature_lengths, packing=packing, long_documents=long_documents
        )

    return plan_source
