"""Settings of generation. This module imports no JAX, so that commands can make flags of the settings."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

EarlyStopping = bool | Literal["never"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; `repetition_penalty` is applied first, then the attributes in order.

    Attributes:
      temperature: divides the logits; 0 chooses the most probable token (ties go to the first), without restrictions.
      top_k: restricts the draw to the k most probable tokens (ties go to the first); None for all.
      top_p: then restricts it to the fewest tokens whose probabilities sum to at least p (nucleus
        sampling, arXiv 1904.09751); None for all.
      min_p: then restricts it to tokens at least p times as probable as the most probable one (arXiv
        2407.01082); None for all.
      repetition_penalty: r above 1 makes all tokens of the prompt and the continuation less probable:
        their logits are divided by r if positive, otherwise multiplied by r (CTRL, arXiv 1909.05858,
        section 4.1, with the sign as in Hugging Face); 1 for none. Also applies to greedy decoding and
        beam search.
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
            raise ValueError(f"top_k = {self.top_k} must be at least 1; omit it for all tokens.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must be in (0, 1].")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p = {self.min_p} must be in [0, 1].")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty = {self.repetition_penalty} must be positive; 1 is for none."
            )
        if self.temperature == 0:
            for name, neutral in (("top_k", None), ("top_p", 1), ("min_p", 0)):
                if (value := getattr(self, name)) not in (None, neutral):
                    raise ValueError(
                        f"{name} = {value} has no effect with temperature = 0, which chooses the most probable token: remove "
                        "it, or set a temperature."
                    )

    @property
    def restricted(self) -> bool:
        """Whether only a subset of the tokens may be drawn."""
        return any(value is not None for value in (self.top_k, self.top_p, self.min_p))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw:
    """How one prompt is continued, where the prompts of a batch differ; it replaces the temperature and top_p of `Settings`.

    Attributes:
      seed, index, sample: the draws are a function of these, as of the seed, the index of the prompt and the number of the
        sample where prompts do not differ.
      temperature: see `Sampling`.
      top_p: see `Sampling`; 1 for all tokens.
    """

    seed: int
    index: int = 0
    sample: int = 0
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self):
        Sampling(temperature=self.temperature, top_p=self.top_p)  # raises ValueError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beams:
    """Settings of beam search, with the names and meaning of Hugging Face's GenerationConfig.

    Attributes:
      num_beams: K, the number of beams of each prompt.
      length_penalty: x in length^x, which divides the score of a finished beam.
      early_stopping: True ends a prompt as soon as K sequences are finished. False ends it when the best
        running beam, scored at its current length, is worse than all K finished ones. "never" scores the
        running beam at the most favourable length instead.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False

    def __post_init__(self):
        if self.num_beams < 2:
            raise ValueError(
                f"num_beams = {self.num_beams} must be at least 2; omit it for no beam search."
            )
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(
                f"early_stopping = {self.early_stopping!r} must be True, False or 'never'."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The static settings of a generation program.

    Attributes:
      max_new_tokens: M, the maximum length of a continuation.
      eos_ids: tokens that end a row; the EOS token is the last token of its row.
      num_ids: size of the vocabulary; ids from `num_ids` on are padding of the model's table and are
        never chosen. None allows all rows of the table.
      num_samples: number of continuations of each prompt: independent draws, or the best beams.
      beams: settings of beam search; None to choose token by token.
    """

    max_new_tokens: int = 128
    sampling: Sampling = Sampling(temperature=0.0)
    eos_ids: Sequence[int] = ()
    num_ids: int | None = None
    num_samples: int = 1
    beams: Beams | None = None

    def __post_init__(self):
        if not 1 <= self.max_new_tokens < 2**31:
            raise ValueError(
                f"max_new_tokens = {self.max_new_tokens} must be at least 1, and positions are numbers below 2**31."
            )
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
                f"num_samples = {self.num_samples} exceeds num_beams = {self.beams.num_beams}: the samples are the "
                "best beams."
            )
        elif self.sampling.temperature or self.sampling.restricted:
            raise ValueError(
                "Beams are searched, not drawn: set num_beams, or temperature, top_k, top_p and min_p."
            )
