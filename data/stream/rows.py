"""Reads plan rows into the arrays of a batch: tokens, shifted inputs, segment ids and positions.

Shape suffixes: B rows, L length, S segments of all rows, T tokens of all segments; of sentences K examples, S their width.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from espalier.data.cache import fingerprint
from espalier.data.cache.store import Cache, digest
from espalier.data.stream import stored_plan
from espalier.data.stream.plan import LOSS_WEIGHTS, Plan, check_loss_weights, make_plan

Notice = tuple[str, str]  # name and text
MANY = 0.05  # the share of dropped records above which a notice is a warning
# The feature with an embedding of each example, float32 of one width, and the column of a batch that it becomes.
SENTENCE, SENTENCES = "sentence_embedding", "sentence_embeddings"
NO_ROW = -1  # a row without tokens, to fill a batch past the end of a split


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of rows: a token cache and the plan of its rows."""

    name: str
    cache: Cache
    plan: Plan

    feature: ClassVar[str] = "targets"  # the feature whose vocabulary is the model's vocabulary

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per target token; 0 if unknown, or if not every token has loss weight 1."""
        if self.feature != "targets" or LOSS_WEIGHTS in self.cache.columns:
            return 0.0
        return (self.cache.text_bytes() or 0) / self.cache.tokens()

    @functools.cached_property
    def loss_tokens(self) -> float:
        """The sum of the loss weights of all tokens of the planned rows; without weights, the number of these tokens."""
        if LOSS_WEIGHTS not in self.cache.columns:
            return self.plan.tokens()
        if self.plan.loss_tokens is not None:
            return self.plan.loss_tokens
        begin_S = self.begins("targets", np.arange(len(self.plan.records)))
        weights = self.cache.columns[LOSS_WEIGHTS]  # one for each target, hence the same offsets
        return float(weights.sums(begin_S, np.asarray(self.plan.lengths["targets"])).sum())

    def segments(self, row: int) -> range:
        """Returns the indices in the plan of a row's segments."""
        if row == NO_ROW:
            return range(0)
        return range(*self.plan.row_starts[row : row + 2].tolist())

    def begins(self, feature: str, segment_S: np.ndarray) -> np.ndarray:
        """Returns the index in the feature's column of the first token of segments, int64 [S]."""
        if self.plan.begins:
            return self.plan.begins[feature][segment_S]
        starts_N = self.cache.columns[feature].starts
        return starts_N[self.plan.records[segment_S]] + self.plan.offsets[segment_S]

    def documents(self, row: int) -> list[dict]:
        """Returns the documents of one row: id, record in the cache, and sizes in tokens."""
        return [
            {
                "id": self.cache.name_of(record, prefix=f"{self.name}/"),
                "record": record,
                **self._segment_sizes(segment),
            }
            for segment in self.segments(row)
            for record in [int(self.plan.records[segment])]
        ]

    def _segment_sizes(self, segment: int) -> dict[str, int]:
        offset, length = self.plan.offsets[segment], self.plan.lengths["targets"][segment]
        return {"offset": int(offset), "length": int(length)}

    def summary(self) -> dict:
        """Returns sizes, and counts of records that are dropped, cut or truncated."""
        return {
            "cache": str(self.cache.directory),
            "content": self.cache.content,
            "fingerprint": self.cache.fingerprint,
            **self._sizes(),
            **self.plan.counts,
        }

    def notices(self, lengths: Mapping[str, int]) -> list[Notice]:
        """Returns messages on records that were dropped or cut, with `lengths` as the setting that did it."""
        plan = self.plan
        if "long_records" not in plan.first:
            return []
        records, long = plan.counts["records"], plan.counts["long_records"]
        dropped = plan.long_documents == "drop"
        text = (
            f"of {records:,} documents, at {lengths} tokens (TASK_FEATURE_LENGTHS), {long:,} ({long / records:.1%}) "
            f"{'dropped' if dropped else 'cut at their ends'} (first: {plan.first['long_records']})"
        )
        return [notice("too long", long / records if dropped else 0.0, text)]

    def _sizes(self) -> dict[str, Any]:
        return {
            "tokens": self.plan.tokens(),
            "text_bytes": self.cache.text_bytes(),
            "rows": self.plan.num_rows,
            "fill": self.plan.fill(),
            **({"first": self.plan.first} if self.plan.first else {}),
        }


def notice(name: str, dropped: float, text: str) -> Notice:
    """Returns a notice, as a warning if the share of records that were dropped is large."""
    return "WARNING" if dropped > MANY else name, text


def plan_source(
    name: str,
    opened: Cache,
    feature_lengths: Mapping[str, int],
    *,
    packing: str = "best_fit",
    long_documents: str = "split",
    inputs_prefix: Sequence[int] = (),
    verify: bool = True,
) -> Source:
    """Returns a source with planned rows, made from an opened token cache without SeqIO.

    The rows of large caches are planned once and stored, see data/stream/stored_plan.py.

    Args:
        feature_lengths: {'targets': tokens per row}, or with 'inputs' as well.
        packing, long_documents, inputs_prefix: see `data.stream.plan.make_plan`.
        verify: check every byte of a stored plan on this machine.

    Raises:
        ValueError: the cache lacks a feature, has invalid loss weights, or holds no target tokens.
        CacheCorruptError: a stored plan is damaged.
    """
    if set(feature_lengths) not in ({"targets"}, {"inputs", "targets"}):
        raise ValueError(
            f"task_feature_lengths {dict(feature_lengths)} must give 'targets', or 'inputs' and "
            "'targets'."
        )
    check_features(name, opened, feature_lengths)
    of_features = {feature: _vocabulary(opened, feature) for feature in feature_lengths}
    if len({each["digest"] for each in of_features.values()}) > 1:
        sizes = {feature: each["size"] for feature, each in of_features.items()}
        raise ValueError(
            f"Source {name!r}: inputs and targets were tokenised with different vocabularies (sizes {sizes}), but a model "
            "has one table of tokens: give both features one vocabulary."
        )
    policy: dict[str, Any] = {
        "packing": packing,
        "long_documents": long_documents,
        "inputs_prefix": tuple(inputs_prefix),
    }
    where = f"Source {name!r}: feature {LOSS_WEIGHTS!r}"
    weighted = LOSS_WEIGHTS in opened.columns
    if weighted and opened.manifest["features"][LOSS_WEIGHTS] != "float32":
        raise ValueError(f"{where} must be declared with a floating dtype, such as tf.float32.")
    if stored_plan.is_needed(opened):  # it checks the loss weights of each shard as it plans it
        planned = stored_plan.open_plan(opened, feature_lengths, verify=verify, **policy)
    else:
        if weighted:
            targets, weights = opened.columns["targets"], opened.columns[LOSS_WEIGHTS]
            check_loss_weights(where, targets.lengths, weights.lengths, weights.shards)
        lengths = {feature: opened.columns[feature].lengths for feature in feature_lengths}
        planned = make_plan(lengths, feature_lengths, **policy)
    if not planned.num_rows:
        if planned.counts["long_records"]:
            raise ValueError(
                f"Source {name!r}: long_documents = {long_documents!r} drops all of its records with targets, since "
                f"{planned.counts['long_records']} are longer than {dict(feature_lengths)} tokens: raise TASK_FEATURE_LENGTHS."
            )
        raise ValueError(f"Source {name!r} is empty: {opened.directory} holds no target tokens.")
    if long_documents != "split" and planned.first_long is not None:
        first = {"long_records": opened.name_of(planned.first_long)}
        planned = dataclasses.replace(planned, first=first)
    return Source(name, opened, planned)


def check_features(name: str, opened: Cache, features: Iterable[str], remedy: str = "") -> None:
    """Raises ValueError if the cache of a source lacks a feature."""
    for feature in features:
        if feature not in opened.columns:
            raise ValueError(
                f"Source {name!r} has no feature {feature!r}; it has {', '.join(opened.columns)}.{remedy}"
            )


def check_prompts(name: str, opened: Cache, has_tokens_N: np.ndarray) -> None:
    """Raises ValueError if a prompt has no token to read."""
    if not has_tokens_N.all():
        raise ValueError(
            f"Source {name!r}: the prompt of {opened.name_of(int(has_tokens_N.argmin()))} is empty, and "
            "start_token=None adds no token before it. Set start_token, or add_bos=True of the task."
        )


def shared_vocabulary(sources: Sequence[Source]) -> dict:
    """Returns {'size', 'digest'} of the vocabulary of all sources.

    Raises:
        ValueError: two sources were tokenised with different vocabularies.
    """
    vocabularies = {source.name: _vocabulary(source.cache, source.feature) for source in sources}
    first, *rest = vocabularies
    for name in rest:
        if vocabularies[name] != vocabularies[first]:
            raise ValueError(
                f"Sources {first!r} and {name!r} were tokenised with different vocabularies (sizes "
                f"{vocabularies[first]['size']} and {vocabularies[name]['size']}): a mixture needs one."
            )
    return vocabularies[first]


def _vocabulary(opened: Cache, feature: str) -> dict[str, Any]:
    """Returns {'size', 'digest'} of the vocabulary of a feature."""
    described = opened.manifest["description"].get("vocabulary", {}).get(feature, {})
    size = opened.manifest["features"][feature]
    return {"size": size, "digest": digest([size, described.get("vocabulary")])}


def vocabulary_digest(vocabulary) -> str:
    """Returns the digest that `shared_vocabulary` gives for tokens of this SeqIO vocabulary."""
    return digest([int(vocabulary.vocab_size), fingerprint.vocabulary(vocabulary)])


def read_rows(
    sources: Sequence[Source],
    source_B: np.ndarray,
    row_B: np.ndarray,
    *,
    cross_document_attention: bool = False,
    start_token: int | None = 0,
    sentences: tuple[int, int] = (0, 0),
) -> dict[str, np.ndarray]:
    """Returns a batch of rows, with the column names that models expect.

    Decoder inputs are the targets shifted right within their segment. The first input of a segment
    is `start_token`, or the preceding token of the record if the segment continues a record.
    Segment ids count from 1 in each row; 0 is padding. Positions restart at 0 in each segment. With
    `cross_document_attention` a row is one segment: all ids are 1, and positions and shifts ignore
    document boundaries.

    With a feature 'inputs' there are encoder columns too; encoder and decoder segments with equal
    ids belong together. Loss weights are 1 at every token, or the values of the feature
    'loss_weights'.

    Args:
        source_B: index of each row's source.
        row_B: plan row in that source, or `NO_ROW` for a row of padding.
        sentences: (K, width) of the feature SENTENCE: the most examples of a row, and `sentence_width`.

    Returns:
        column -> int32 [B, L]; loss weights are float32 [B, L], `source_ids` are int32 [B], and SENTENCES, of the examples in
        segments 1, 2, ..., are float32 [B, K, width].
    """
    lengths = sources[0].plan.row_lengths
    tokens, segment_ids, positions = (
        {f: np.zeros((len(row_B), length), np.int32) for f, length in lengths.items()}
        for _ in range(3)
    )
    weights = np.zeros(tokens["targets"].shape, np.float32)
    examples, width = sentences
    sentences_BKS = np.zeros((len(row_B), examples, width), np.float32)
    continued = []
    for index in np.unique(source_B[row_B != NO_ROW]):
        source, plan = sources[index], sources[index].plan
        columns = source.cache.columns
        here_B = np.flatnonzero((source_B == index) & (row_B != NO_ROW))
        row_S, ordinal_S, segment_S = segments(plan, row_B[here_B])
        offset_S = plan.offsets[segment_S]
        first_S = np.arange(len(row_S)) - ordinal_S  # the first segment of the same row
        if examples:
            begin_S = plan.records[segment_S].astype(np.int64) * width
            to_S = (here_B[row_S] * examples + ordinal_S) * width
            size_S = np.full_like(begin_S, width)
            columns[SENTENCE].gather(begin_S, size_S, sentences_BKS.reshape(-1), to_S)
        for feature, length in lengths.items():
            size_S = plan.lengths[feature][segment_S].astype(np.int64)
            begin_S = source.begins(feature, segment_S)
            before_S = np.cumsum(size_S) - size_S
            place_S = before_S - before_S[first_S]
            at_S = here_B[row_S] * length + place_S
            prefix = np.asarray(plan.inputs_prefix if feature == "inputs" else (), np.int32)
            flat, more = tokens[feature].reshape(-1), len(prefix)
            columns[feature].gather(begin_S, size_S - more, flat, at_S + more)
            flat[at_S[:, None] + np.arange(more)] = prefix
            id_S, origin_S = ordinal_S + 1, place_S
            if cross_document_attention:
                id_S, origin_S = np.ones_like(id_S), np.zeros_like(place_S)
            ids, origins = spread([id_S, origin_S], size_S, np.flatnonzero(ordinal_S == 0), length)
            segment_ids[feature][here_B] = ids
            positions[feature][here_B] = (np.arange(length, dtype=np.int32) - origins) * (ids > 0)
            if feature == "targets":
                weights[here_B] = ids > 0
                if LOSS_WEIGHTS in columns:  # one weight per target, hence the same offsets
                    columns[LOSS_WEIGHTS].gather(begin_S, size_S, weights.reshape(-1), at_S)
                chosen = (offset_S > 0) & (place_S == origin_S)
                continued.append((columns[feature], begin_S[chosen] - 1, at_S[chosen]))

    # Position 0 marks the first token of a segment and padding: neither takes the shifted target.
    inputs = np.zeros_like(tokens["targets"])
    inputs[:, 1:] = tokens["targets"][:, :-1]
    inputs *= positions["targets"] > 0
    if start_token:
        inputs[(positions["targets"] == 0) & (segment_ids["targets"] > 0)] = start_token
    for column, begin, at in continued:
        column.gather(begin, np.ones(len(at), np.int64), inputs.reshape(-1), at)
    batch = {
        "decoder_input_tokens": inputs,
        "decoder_target_tokens": tokens["targets"],
        "decoder_loss_weights": weights,
        "decoder_segment_ids": segment_ids["targets"],
        "decoder_positions": positions["targets"],
        "source_ids": source_B.astype(np.int32),
    }
    if examples:
        batch[SENTENCES] = sentences_BKS
    if "inputs" in lengths:
        batch["encoder_input_tokens"] = tokens["inputs"]
        batch["encoder_segment_ids"] = segment_ids["inputs"]
        batch["encoder_positions"] = positions["inputs"]
    return batch


def sentence_width(sources: Sequence[Source]) -> int:
    """Returns the width of the feature SENTENCE; 0 without it.

    Raises:
        ValueError: some sources have none, or the widths differ.
    """
    if not any(SENTENCE in source.cache.columns for source in sources):
        return 0
    widths: dict[int, str] = {}
    for source in sources:
        if SENTENCE not in source.cache.columns:
            raise ValueError(
                f"Source {source.name!r} has no feature {SENTENCE!r}, and other sources of the mixture have: give all their examples "
                "one, or none."
            )
        for width in np.unique(np.asarray(source.cache.columns[SENTENCE].lengths)).tolist():
            widths.setdefault(width, source.name)
    if len(widths) > 1 or 0 in widths:
        raise ValueError(
            f"The embeddings {SENTENCE!r} have different widths: {widths}. One model makes embeddings of one width: make them again."
        )
    return next(iter(widths))


def segments(plan: Plan, row_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the segments of rows: (index in `row_B`, place in the row, index in the plan), [S]."""
    begin_B = plan.row_starts[row_B]
    count_B = plan.row_starts[row_B + 1] - begin_B
    row_S = np.repeat(np.arange(len(row_B)), count_B)
    ordinal_S = np.arange(len(row_S)) - np.repeat(np.cumsum(count_B) - count_B, count_B)
    return row_S, ordinal_S, begin_B[row_S] + ordinal_S


def spread(
    values: Sequence[np.ndarray], size_S: np.ndarray, first_B: np.ndarray, length: int
) -> list[np.ndarray]:
    """Repeats each segment's value over its tokens, and 0 over the padding.

    Returns one int32 [B, L] per array [S] of `values`; `first_B` are each row's first segments.
    """
    end_B = np.append(first_B[1:], len(size_S))
    size_P = np.insert(size_S, end_B, length - np.add.reduceat(size_S, first_B))
    return [
        np.repeat(np.insert(value_S, end_B, 0).astype(np.int32), size_P).reshape(-1, length)
        for value_S in values
    ]
