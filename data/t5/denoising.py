"""Rows for an encoder-decoder out of the rows of another stream, whose texts are split when they are read.

A row is split otherwise in every epoch: by the seed, its source, its epoch and its number. The stream is therefore as
much a function of (seed, step) as the stream of texts.

Shapes: B rows, S and T tokens of inputs and targets, N tokens of a text.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from espalier.common.ranges import Count, Seed, Size
from espalier.data import tasks
from espalier.data.cache import store
from espalier.data.stream import order, row_stream
from espalier.data.stream.rows import Notice
from espalier.data.t5.noise import Denoising, SpanCorruption

SPAN_CORRUPTION = SpanCorruption()


class DenoisingStream(row_stream.Iterable):
    """A stream of inputs and targets. Attributes that are not here are those of the stream of texts.

    Args:
        texts: stream of rows that hold one text each: several documents, one after the other.
        denoising, lengths, first_sentinel, end_token, seed: see `make_stream`.
    """

    bytes_per_token = 0.0  # a target is not a token of a text

    def __init__(
        self,
        texts: Any,
        *,
        denoising: Denoising,
        lengths: Mapping[str, int],
        first_sentinel: int | None,
        end_token: int,
        seed: int,
    ):
        self._texts, self._denoising, self._lengths = texts, denoising, dict(lengths)
        self._end_token, self._seed = end_token, seed
        self._sentinel = first_sentinel
        if first_sentinel is None:
            self._sentinel = texts.summary()["vocabulary"]["size"] - 1
        self.length, self.targets_length = sum(lengths.values()), lengths["targets"]
        settings = [denoising.record(), self._lengths, self._sentinel, end_token, seed]
        self.fingerprint = store.digest(["denoising", texts.fingerprint, settings])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._texts, name)

    def summary(self) -> dict[str, Any]:
        """Returns the summary of the texts, with the settings of their split and the targets of a step."""
        facts = self._texts.summary()
        for phase in facts.get("phases", ()):
            phase["tokens_per_step"] *= self._target_share
        return {
            **facts,
            "fingerprint": self.fingerprint,
            "lengths": self._lengths,
            "denoising": self._denoising.record(),
            "start_token": 0,
        }

    def notices(self) -> list[Notice]:
        """Returns the messages of the texts' stream, see `data.stream.row_stream.RowStream.notices`."""
        return self._texts.notices(self._lengths)

    def tokens_per_step(self, step: int) -> float:
        """Returns the mean number of targets per batch, as the first batch has them."""
        return self._texts.tokens_per_step(step) * self._target_share

    def steps_for_tokens(self, tokens: float, first_step: int = 0) -> int:
        """Returns the steps from `first_step` on that train on so many targets, rounded up."""
        return self._texts.steps_for_tokens(tokens / self._target_share, first_step)

    @functools.cached_property
    def _target_share(self) -> float:
        """Targets for each token of a text."""
        read, made = (
            stream.batch(0, 0, self._texts.batch_size)["decoder_loss_weights"]
            for stream in (self._texts, self)
        )
        return float(made.sum() / read.sum())

    def batch(self, step: int, lo: int, hi: int) -> dict[str, np.ndarray]:
        """Returns rows [lo, hi) of the batch of `step`, with the columns of `data.stream.rows.read_rows`.

        Raises:
            ValueError: tokens of a text have no loss, or another weight than 1.
        """
        texts = self._texts.batch(step, lo, hi)
        real_BN = texts["decoder_segment_ids"] > 0
        if not np.array_equal(texts["decoder_loss_weights"], real_BN):
            raise ValueError(
                "A task weighs its tokens, which have no place in inputs and targets: use tasks without loss_weights."
            )
        parts: dict[str, list[np.ndarray]] = {"inputs": [], "targets": []}
        rows = self._texts.places(step, lo, hi)
        for tokens_N, real_N, row in zip(
            texts["decoder_target_tokens"], real_BN, rows, strict=True
        ):
            inputs, targets = self._split(tokens_N[real_N], row)
            parts["inputs"].append(inputs)
            parts["targets"].append(targets)
        columns = {
            **self._padded("encoder", parts["inputs"], self._lengths["inputs"]),
            **self._padded("decoder", parts["targets"], self._lengths["targets"]),
        }
        targets_BT = columns.pop("decoder_input_tokens")
        shifted_BT = np.zeros_like(targets_BT)
        shifted_BT[:, 1:] = targets_BT[:, :-1]
        real_BT = columns["decoder_segment_ids"]
        return {
            "decoder_input_tokens": shifted_BT * real_BT,
            "decoder_target_tokens": targets_BT,
            "decoder_loss_weights": real_BT.astype(np.float32),
            **columns,
            "source_ids": texts["source_ids"],
        }

    def _split(self, tokens_N: np.ndarray, row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the inputs and targets of a text, each with its end token; empty ones of an empty row."""
        if not len(tokens_N):
            return tokens_N, tokens_N
        key = order.hash64(self._seed, "denoising", row["source"], row["epoch"], row["row"])
        draw = np.random.Philox(key=key).random_raw
        inputs_S, targets_T = self._denoising.split(tokens_N, draw, self._sentinel)
        end = [self._end_token]
        return np.concatenate([inputs_S, end]), np.concatenate([targets_T, end])

    @staticmethod
    def _padded(name: str, rows: list[np.ndarray], length: int) -> dict[str, np.ndarray]:
        """Returns tokens, segment ids and positions [B, length] of rows with one segment each."""
        tokens = np.zeros((len(rows), length), np.int32)
        real = np.zeros_like(tokens)
        for b, row in enumerate(rows):
            tokens[b, : len(row)], real[b, : len(row)] = row, 1
        return {
            f"{name}_input_tokens": tokens,
            f"{name}_segment_ids": real,
            f"{name}_positions": np.arange(length, dtype=np.int32)[None] * real,
        }


def make_stream(
    *,
    stream: Callable[..., Any],
    task_feature_lengths: Mapping[str, Size],
    denoising: Denoising = SPAN_CORRUPTION,
    first_sentinel: Count | None = None,
    end_token: Count = 1,
    seed: Seed = 0,
    **arguments: Any,
) -> DenoisingStream:
    """Returns a training or evaluation stream of inputs and targets.

    Args:
        stream: `data.stream.stream.make_stream` or `make_eval_stream`, with rows of `text_lengths` and packing='concat'.
        task_feature_lengths: {'inputs': tokens that the encoder reads, 'targets': tokens that the decoder predicts}, end
            tokens included.
        denoising: how a text becomes inputs and targets.
        first_sentinel: id of the first span's sentinel, from which the others descend; None for the last id of the
            vocabulary, whose last ids are sentinels if it has `extra_ids`.
        end_token: id that ends inputs and targets.
        seed: seed of the splits.
        **arguments: arguments of `stream`, such as `task` or `positions`.

    Raises:
        ValueError: the data cannot be streamed with these settings.
    """
    length = text_lengths(task_feature_lengths=task_feature_lengths, denoising=denoising)["targets"]
    texts = stream(**arguments)
    if texts.length > length:
        raise ValueError(
            f"Texts of {texts.length} tokens do not fit rows of {dict(task_feature_lengths)}, only those of {length}: bind "
            "stream.make_stream.task_feature_lengths = @denoising.text_lengths(), as runs/denoise.gin does."
        )
    if first_sentinel is None and (needed := denoising.sentinels(length)):
        vocabulary = tasks.vocabulary(texts.source_names[0])
        check_sentinels(getattr(vocabulary, "extra_ids", 0), needed)
    return DenoisingStream(
        texts,
        denoising=denoising,
        lengths=task_feature_lengths,
        first_sentinel=first_sentinel,
        end_token=end_token,
        seed=seed,
    )


def text_lengths(
    *, task_feature_lengths: Mapping[str, Size], denoising: Denoising = SPAN_CORRUPTION
) -> dict[str, int]:
    """Returns {'targets': tokens of the longest texts that fit rows of these lengths}; see `make_stream`.

    Raises:
        ValueError: the lengths are not of inputs and targets, or have no room for a text.
    """
    if set(task_feature_lengths) != {"inputs", "targets"}:
        raise ValueError(
            f"TASK_FEATURE_LENGTHS = {dict(task_feature_lengths)} must have 'inputs' and 'targets', for example "
            '{"inputs": 512, "targets": 114}.'
        )
    return {"targets": denoising.text_length(task_feature_lengths)}


def check_sentinels(count: int, needed: int) -> None:
    """Raises ValueError if a vocabulary of `count` sentinels has fewer than needed."""
    if count < needed:
        raise ValueError(
            f"A row needs {needed} sentinels, but the vocabulary has {count}, so that tokens of texts would be sentinels too. "
            "Add some to the vocabulary of the data file, as --gin.vocabularies.byte.extra_ids=100 does, or set first_sentinel "
            "to the id of the first of its own."
        )
