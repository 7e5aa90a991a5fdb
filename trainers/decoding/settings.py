"""Settings of generation. This module imports no JAX, so that commands can make flags of the settings."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

NO_EOS = -1
EarlyStopping = bool | Literal["never"]


def eos_ids(vocabulary: Any) -> tuple[int, ...]:
    """The tokens that end a text, by a SeqIO vocabulary that may have several; empty without EOS."""
    ids = getattr(vocabulary, "eos_ids", None) or (vocabulary.eos_id,)
    return tuple(id for id in ids if id not in (None, NO_EOS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; `repetition_penalty` comes first, then the attributes in order.

    Attributes:
      temperature: divides the logits; 0 takes the most probable token (the first of equals).
      top_k: draw among the k most probable tokens, the first of equals; None for all.
      top_p: then among the fewest tokens whose probabilities add up to at least p (nucleus sampling,
        arXiv 1904.09751); None for all.
      min_p: then among tokens at least p times as probable as the most probable one (arXiv
        2407.01082); None for all.
      repetition_penalty: r above 1 makes every token of the prompt and of the continuation less
        probable: its logit is divided by r if positive, else multiplied (CTRL, arXiv 1909.05858,
        section 4.1, with the sign as in transformers); 1 for none. Greedy choices and beams heed it.

    Raises:
      ValueError: a value outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature} must be 0 (greedy) or positive.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k} must be at least 1; leave it out for all.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must be in (0, 1].")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p = {self.min_p} must be in [0, 1].")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty = {self.repetition_penalty} must be positive; 1 is for none."
            )

    @property
    def restricted(self) -> bool:
        """Whether only some of the tokens may be drawn."""
        return any(value is not None for value in (self.top_k, self.top_p, self.min_p))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beams:
    """How beams are searched; names and meaning are those of transformers' GenerationConfig.

    Attributes:
      num_beams: K, beams of each prompt, which are searched in place of sampling.
      length_penalty: x in length^x, by which the score of a finished beam is divided.
      early_stopping: True ends a prompt as soon as K sequences are finished; False when its best
        running beam, scored at its present length, is behind all of them; "never" when it would be at
        the most favourable length.

    Raises:
      ValueError: fewer than two beams, or an unknown early_stopping.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False

    def __post_init__(self):
        if self.num_beams < 2:
            raise ValueError(
                f"num_beams = {self.num_beams} must be at least 2; leave it out for none."
            )
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(
                f"early_stopping = {self.early_stopping!r} must be True, False or 'never'."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a generation program is compiled for.

    Attributes:
      max_new_tokens: M, the longest continuation.
      sampling: choice of the next token.
      eos_ids: tokens that end a row; the one that does counts as its last.
      eos_id: one more of them; NO_EOS for none.
      num_ids: size of the vocabulary; ids from there on are padding of the model's table and are
        never chosen. None for all rows of the table.
      num_samples: continuations of each prompt: independent draws, or the best of the beams.
      beams: search in place of choosing token by token; None for none.

    Raises:
      ValueError: settings out of range, or that contradict each other.
    """

    max_new_tokens: int = 128
    sampling: Sampling = Sampling(temperature=0.0)
    eos_ids: Sequence[int] = ()
    eos_id: int = NO_EOS
    num_ids: int | None = None
    num_samples: int = 1
    beams: Beams | None = None

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {self.max_new_tokens} must be at least 1.")
        if self.num_samples < 1:
            raise ValueError(f"num_samples = {self.num_samples} must be at least 1.")
        if self.beams is None:
            if self.num_samples > 1 and self.sampling.temperature == 0:
                raise ValueError(
                    f"num_samples = {self.num_samples} greedy continuations would all be the same: set "
                    "a temperature above 0, or num_beams."
                )
        elif self.num_samples > self.beams.num_beams:
            raise ValueError(
                f"num_samples = {self.num_samples} exceeds num_beams = {self.beams.num_beams}, of which "
                "they are the best."
            )
        elif self.sampling.temperature or self.sampling.restricted:
            raise ValueError(
                "Beams are searched, not drawn: temperature, top_k, top_p and min_p do not go with "
                "num_beams."
            )

    @property
    def ends(self) -> tuple[int, ...]:
        """All tokens that end a row."""
        ids = dict.fromkeys((*self.eos_ids, self.eos_id))
        return tuple(id for id in ids if id != NO_EOS)

    @property
    def rows_per_prompt(self) -> int:
        """Rows of the caches while decoding."""
        return self.num_samples if self.beams is None else self.beams.num_beams
