"""The training and evaluation streams: batches as a pure function of (seed, step).

    SeqIO task -> token cache -> row plan -> schedule -> order -> batch(step, lo, hi)

Any step is computed by arithmetic, independent of what was read before. Each host requests the rows
of the global batch that it needs, so neither the number of hosts nor the mesh changes the content
of a batch. The step is the whole state of a stream.
"""

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from espalier.common.ranges import Amount, Count, Positive, Seed, Size
from espalier.data.cache import store
from espalier.data.choices import check_choice
from espalier.data.stream import mixing, plan, repeats, rows, schedule
from espalier.data.stream.row_stream import EvalStream
from espalier.data.stream.train_stream import Phases, Positions, Stream

AnySource = TypeVar("AnySource", bound=rows.Source)
AnyStream = TypeVar("AnyStream", bound=Stream)


_UNIMAX_EPOCHS = 4.0  # repeated that often, tokens are nearly worth new ones


class NoSplitError(ValueError):
    """A task has no such split, for example because no document is held out."""


def make_stream(
    *,
    mixture_or_task_name: str,
    task_feature_lengths: Mapping[str, Size],
    batch_size: Size,
    seed: Seed = 0,
    split: str = "train",
    weights: mixing.Weights = "rates",
    temperature: Positive = 1.0,
    max_tokens: Amount | None = None,
    unimax_tokens: Amount | None = None,
    unimax_epochs: Positive | None = None,
    phases: Phases | None = None,
    interleaving: schedule.Interleaving = "error_diffusion",
    packing: plan.Packing = "best_fit",
    long_documents: plan.LongDocuments = "split",
    inputs_prefix: Sequence[Count] = (),
    cross_document_attention: bool = False,
    start_token: Count = 0,
    max_epochs: repeats.MaxEpochs | None = None,
    on_cap: repeats.OnCap = "error",
    positions: Positions | None = None,
    cache_dir: str | os.PathLike | None = None,
    changed_cache: store.Changed = "refuse",
    verify_cache: bool = True,
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

    Raises:
        ValueError: the data cannot be streamed with these settings.
    """
    return open_mixture(
        Stream,
        mixture_or_task_name,
        _planner(task_feature_lengths, packing, long_documents, inputs_prefix),
        split=split,
        weights=weights,
        temperature=temperature,
        max_tokens=max_tokens,
        unimax_tokens=unimax_tokens,
        unimax_epochs=unimax_epochs,
        phases=phases,
        max_epochs=max_epochs,
        cache_dir=cache_dir,
        changed_cache=changed_cache,
        verify_cache=verify_cache,
        batch_size=batch_size,
        seed=seed,
        cross_document_attention=cross_document_attention,
        start_token=start_token,
        interleaving=interleaving,
        on_cap=on_cap,
        positions=positions,
    )


def make_eval_stream(
    *,
    task: str,
    task_feature_lengths: Mapping[str, Size],
    batch_size: Size,
    split: str = "validation",
    packing: plan.Packing = "best_fit",
    long_documents: plan.LongDocuments = "split",
    inputs_prefix: Sequence[Count] = (),
    cross_document_attention: bool = False,
    start_token: Count = 0,
    cache_dir: str | os.PathLike | None = None,
    changed_cache: store.Changed = "refuse",
    verify_cache: bool = True,
) -> EvalStream:
    """Returns the evaluation stream of a SeqIO task: every row once, in a fixed random order.

    In the order of the plan, which begins with the pieces of long documents, the first batches
    (EVAL_STEPS) would be a biased sample. Mixtures are evaluated task by task, as in SeqIO.
    `make_stream` describes the arguments.

    Raises:
        NoSplitError: the task has no such split.
        ValueError: the data cannot be streamed with these settings.
    """
    source = open_held_out(
        task,
        _planner(task_feature_lengths, packing, long_documents, inputs_prefix),
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
    stream_class: type[AnyStream],
    mixture_or_task_name: str,
    plan_source: Callable[[str, store.Cache], rows.Source],
    *,
    split: str,
    weights: mixing.Weights = "rates",
    temperature: float = 1.0,
    max_tokens: int | None = None,
    unimax_tokens: int | None = None,
    unimax_epochs: float | None = None,
    phases: Phases | None = None,
    max_epochs: repeats.MaxEpochs | None,
    cache_dir: str | os.PathLike | None,
    changed_cache: store.Changed,
    verify_cache: bool,
    **settings: Any,
) -> AnyStream:
    """Returns a stream over the sources with positive weight in a mixture.

    `make_stream` describes the other arguments.

    Args:
        stream_class: class of the stream.
        plan_source: (task name, opened token cache) -> source with planned rows.
        **settings: further arguments of `stream_class`.

    Raises:
        ValueError: settings contradict each other, or weights cannot be normalised.
    """
    tasks, weight_of = mixing.find_tasks(mixture_or_task_name)
    known = tuple(task.name for task in tasks)
    check_choice("weights", weights, mixing.Weights)
    if phases is not None and (weights != "rates" or temperature != 1.0):
        raise ValueError("phases set the weights: remove the settings weights and temperature.")
    if max_tokens is not None and weights != "tokens":
        raise ValueError("max_tokens caps token counts: it needs weights='tokens'.")
    if (unimax_tokens, unimax_epochs) != (None, None) and weights != "unimax":
        raise ValueError("unimax_tokens and unimax_epochs need weights='unimax'.")
    if weights == "unimax" and temperature != 1.0:
        raise ValueError("temperature has no meaning with weights='unimax': remove it.")
    if phases is not None:
        phases = mixing.checked_phases(phases, known)
    elif weights == "rates":
        rates = mixing.tempered(weight_of, temperature)
        where = f"mixture {mixture_or_task_name!r}"
        phases = [(0, mixing.normalised(rates, known, where))]
    wanted = known if phases is None else {name for _, shares in phases for name in shares}
    caches = {"cache_dir": cache_dir, "changed": changed_cache, "verify": verify_cache}
    sources = [
        plan_source(task.name, _open_cache(task, split, **caches))
        for task in tasks
        if task.name in wanted
    ]
    if isinstance(max_epochs, Mapping):  # caps may name tasks that no phase reads
        unused = set(known) - set(wanted)
        max_epochs = {name: cap for name, cap in max_epochs.items() if name not in unused}
    if phases is None:
        counts = {source.name: source.plan.tokens() for source in sources}
        if weights == "unimax":
            budget = sum(counts.values()) if unimax_tokens is None else unimax_tokens
            shares = mixing.unimax(
                counts, budget, _UNIMAX_EPOCHS if unimax_epochs is None else unimax_epochs
            )
        else:
            shares = mixing.tempered(counts, temperature, max_tokens)
        phases = ((0, shares),)
    return stream_class(sources, phases, max_epochs=max_epochs, **settings)


def open_held_out(
    task: str,
    plan_source: Callable[[str, store.Cache], AnySource],
    *,
    split: str,
    **cache_settings: Any,
) -> AnySource:
    """Opens and plans the evaluation split of one task; see `open_mixture` and `open_task_cache`.

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
    if split not in tasks[0].splits:
        raise NoSplitError(
            f"Task {task!r} has no split {split!r}; it has {', '.join(sorted(tasks[0].splits))}. Hold "
            "documents out (VALIDATION_FRACTION above 0, or VALIDATION_FILES; for pairs "
            "PAIRS_VALIDATION_FRACTION or PAIRS_VALIDATION), or do not evaluate the task."
        )
    return plan_source(task, _open_cache(tasks[0], split, **cache_settings))


def _open_cache(task, split: str, **cache_settings: Any) -> store.Cache:
    from espalier.data.cache import (
        task_cache,  # imports SeqIO, which a stream over caches does not need
    )

    return task_cache.open_task_cache(task, split, **cache_settings)


def _planner(
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
    )
