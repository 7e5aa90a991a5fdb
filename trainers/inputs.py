"""The arrays of a batch, and the unit that its rates count.

`Recipe.inputs` describes the rows of a batch, which need not be text. It is independent of where they come from: a
stream (trainers/batches.py) makes arrays of these shapes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np

from espalier.common.ranges import Size
from espalier.model.protocol import Model
from espalier.model.rows import RowKind

Arrays = dict[str, jax.ShapeDtypeStruct]
# (prompt including the start token, completion including its end token)
Text = tuple[Sequence[int], Sequence[int]]


class Inputs(Protocol):
    """Rows of one kind.

    Attributes:
      unit: unit of rates, 'tokens' or 'images'.
      loss_per: unit of a loss's mean, 'tokens', 'images' or 'pairs'.
      length: tokens in a row; None for images.
    """

    @property
    def unit(self) -> str: ...
    @property
    def loss_per(self) -> str: ...
    @property
    def length(self) -> int | None: ...

    def arrays(self, rows: int) -> Arrays:
        """Shapes and dtypes of a batch of so many rows, by name."""

    def init_arguments(self) -> tuple[jax.Array, ...]:
        """Returns the arguments of the model's `init` after its rng; parameters do not depend on the values."""

    def read_by(self, row: RowKind) -> "Inputs":
        """Returns these inputs in the kind of row that a model reads; themselves if they have one kind."""


class TokenRows:
    """The part of `Inputs` that all rows of tokens share."""

    unit = "tokens"
    loss_per = "tokens"

    def init_arguments(self) -> tuple[jax.Array, ...]:
        """See `Inputs`. Parameters do not depend on the length, and few tokens are traced faster."""
        return (jnp.zeros((1, 8), jnp.int32),)

    def read_by(self, row: RowKind) -> Self:
        """See `Inputs`."""
        del row
        return self


@dataclasses.dataclass(frozen=True)
class PackedTokens(TokenRows):
    """Documents packed into rows of `length` tokens, with targets, for a decoder."""

    length: int

    def arrays(self, rows: int) -> Arrays:
        per_token = (rows, self.length)
        return {
            "decoder_input_tokens": jax.ShapeDtypeStruct(per_token, jnp.int32),
            "decoder_target_tokens": jax.ShapeDtypeStruct(per_token, jnp.int32),
            "decoder_loss_weights": jax.ShapeDtypeStruct(per_token, jnp.float32),
            "decoder_segment_ids": jax.ShapeDtypeStruct(per_token, jnp.int32),
            "decoder_positions": jax.ShapeDtypeStruct(per_token, jnp.int32),
            "source_ids": jax.ShapeDtypeStruct((rows,), jnp.int32),
        }


@dataclasses.dataclass(frozen=True)
class InputsAndTargets(TokenRows):
    """Examples packed into rows of an encoder-decoder: segment k of the inputs belongs to segment k of the targets.

    Attributes:
      inputs: tokens of a row that the encoder reads.
      targets: tokens of a row that the decoder predicts.
    """

    inputs: int
    targets: int

    @property
    def length(self) -> int:
        return self.inputs + self.targets

    def arrays(self, rows: int) -> Arrays:
        read = jax.ShapeDtypeStruct((rows, self.inputs), jnp.int32)
        names = ("input_tokens", "segment_ids", "positions")
        return {
            **{f"encoder_{name}": read for name in names},
            **PackedTokens(self.targets).arrays(rows),
        }


def packed(feature_lengths: Mapping[str, int]) -> PackedTokens | InputsAndTargets:
    """Returns rows of packed tokens of these lengths: of a decoder or, with 'inputs', of an encoder-decoder."""
    if "inputs" in feature_lengths:
        return InputsAndTargets(feature_lengths["inputs"], feature_lengths["targets"])
    return PackedTokens(feature_lengths["targets"])


@dataclasses.dataclass(frozen=True)
class PackedPairs(TokenRows):
    """Pairs of completions packed into rows: segment 2k + 1 is a row's k-th chosen one, 2k + 2 its rejected.

    Attributes:
      feature_lengths: {'targets': tokens of a row}; of an encoder-decoder also its 'inputs'.
      pairs: K, the most pairs in a row, which data decide; any K serves to compile without data.
      stored_reference: whether a reference's log-probabilities come with the pairs.
      labels: whether examples are unpaired, with a label each.
      read_last: whether last tokens are read, as reward models need it.
      margins: whether data have margins by which chosen completions are better, for losses of rewards.
    """

    feature_lengths: Mapping[str, Size]
    pairs: Size = 1
    stored_reference: bool = True
    labels: bool = False
    read_last: bool = False
    margins: bool = False
    loss_per = "pairs"

    @property
    def length(self) -> int:
        return sum(self.feature_lengths.values())

    def arrays(self, rows: int) -> Arrays:
        per_pair = jax.ShapeDtypeStruct((rows, self.pairs), jnp.float32)
        both = jax.ShapeDtypeStruct((rows, 2 * self.pairs), jnp.float32)
        per_token = jax.ShapeDtypeStruct((rows, self.feature_lengths["targets"]), jnp.float32)
        return {
            **packed(self.feature_lengths).arrays(rows),
            "pair_weights": per_pair,
            "chosen_tokens_per_pair": jax.ShapeDtypeStruct((rows,), jnp.float32),
            **({"reference_log_probs": both} if self.stored_reference else {}),
            **({"pair_labels": per_pair} if self.labels else {}),
            **({"decoder_ends": per_token} if self.read_last else {}),
            **({"pair_margins": per_pair} if self.margins else {}),
        }


@dataclasses.dataclass(frozen=True)
class Images:
    """Square images [size, size, channels], normalised, with a label and a weight each."""

    size: Size
    channels: Size = 3
    unit = "images"
    loss_per = "images"
    length = None

    def arrays(self, rows: int) -> Arrays:
        shape = (rows, self.size, self.size, self.channels)
        return {
            "images": jax.ShapeDtypeStruct(shape, jnp.float32),
            "labels": jax.ShapeDtypeStruct((rows,), jnp.int32),
            "weights": jax.ShapeDtypeStruct((rows,), jnp.float32),
        }

    def init_arguments(self) -> tuple[jax.Array, ...]:
        return (jnp.zeros((1, self.size, self.size, self.channels), jnp.float32),)

    def read_by(self, row: RowKind) -> Self:
        del row
        return self


def rows_of(
    model: Model, inputs: Inputs | None, feature_lengths: Mapping[str, int] | None
) -> Inputs:
    """Returns the rows of a run: `inputs`, or packed tokens of these lengths for the kind of row that the model reads.

    Raises:
      ValueError: there is neither or both, or it is not what the model reads.
    """
    lengths, name = dict(feature_lengths or {}), type(model).__name__
    if inputs is None:
        if "targets" not in lengths:
            raise ValueError(
                f"TASK_FEATURE_LENGTHS = {lengths} lacks 'targets', for example "
                '{"targets": 512}.'
            )
        if not model.row.encodes:
            return PackedTokens(lengths["targets"])
        if "inputs" not in lengths:
            raise ValueError(
                f"TASK_FEATURE_LENGTHS = {lengths} lacks 'inputs', which an encoder-decoder "
                'reads, for example {"inputs": 512, "targets": 114}.'
            )
        return InputsAndTargets(lengths["inputs"], lengths["targets"])
    inputs = inputs.read_by(model.row)
    has_inputs = "encoder_input_tokens" in inputs.arrays(1)
    if has_inputs and not model.row.encodes:
        raise ValueError(
            f"TASK_FEATURE_LENGTHS has 'inputs', and the model, a {name}, has no encoder: give 'targets' alone."
        )
    if not has_inputs and model.row.encodes:
        raise ValueError(
            f"The model, an {name}, reads inputs, and {type(inputs).__name__} has none: set TASK_FEATURE_LENGTHS = "
            "{'inputs': 512, 'targets': 512}."
        )
    if model.inputs_prefix:
        raise ValueError(
            f"With prompt tuning an {name}'s inputs begin with virtual tokens, and those of {type(inputs).__name__} do not: tune "
            "a prompt on inputs with targets, runs/pretrain.gin, or use another adapter."
        )
    if feature_lengths is not None:
        raise ValueError(
            "Recipe.inputs and Recipe.feature_lengths both define the rows: bind one of them."
        )
    return inputs


def pack(
    rows: Sequence[Sequence[Text]], source_B: np.ndarray, *, length: int
) -> dict[str, np.ndarray]:
    """Returns the columns of `PackedTokens`: the texts of a row are segments 1, 2, ...

    The first token of a prompt is only an input, and the last token of a completion only a target. Loss weights are 1
    at the tokens of completions, and 0 elsewhere.
    """
    names = ("input_tokens", "target_tokens", "segment_ids", "positions")
    columns = {f"decoder_{name}": np.zeros((len(rows), length), np.int32) for name in names}
    columns["decoder_loss_weights"] = np.zeros((len(rows), length), np.float32)
    for b, row in enumerate(rows):
        start = 0
        for segment, (prompt, completion) in enumerate(row, 1):
            text = [*prompt, *completion]
            end = start + len(text) - 1
            columns["decoder_input_tokens"][b, start:end] = text[:-1]
            columns["decoder_target_tokens"][b, start:end] = text[1:]
            columns["decoder_segment_ids"][b, start:end] = segment
            columns["decoder_positions"][b, start:end] = np.arange(len(text) - 1)
            columns["decoder_loss_weights"][b, start + len(prompt) - 1 : end] = 1
            start = end
    return {**columns, "source_ids": np.asarray(source_B, np.int32)}


def pack_encoded(
    rows: Sequence[Sequence[Text]], source_B: np.ndarray, *, inputs: int, targets: int
) -> dict[str, np.ndarray]:
    """Returns the columns of `InputsAndTargets`: segment k of the inputs is a prompt, and that of the targets its completion.

    The first token of a prompt is the one that the targets follow. The encoder reads the others.

    Args:
      rows: the texts of each row; see `pack`.
      inputs, targets: tokens of a row that the encoder and the decoder read.

    Raises:
      ValueError: a prompt has no token that an encoder could read.
    """
    names = ("input_tokens", "segment_ids", "positions")
    columns = {f"encoder_{name}": np.zeros((len(rows), inputs), np.int32) for name in names}
    for b, row in enumerate(rows):
        start = 0
        for segment, (prompt, _) in enumerate(row, 1):
            if len(prompt) < 2:
                raise ValueError(
                    "A prompt is empty, and an encoder reads at least one token: set PROMPT_EOS = True, so that prompts end "
                    "with EOS."
                )
            end = start + len(prompt) - 1
            columns["encoder_input_tokens"][b, start:end] = prompt[1:]
            columns["encoder_segment_ids"][b, start:end] = segment
            columns["encoder_positions"][b, start:end] = np.arange(len(prompt) - 1)
            start = end
    completions = [[(prompt[:1], completion) for prompt, completion in row] for row in rows]
    return {**columns, **pack(completions, source_B, length=targets)}
