"""Limits of a server: what one request, and all requests together, may cost."""

import dataclasses

# Characters of a text for each token that a prompt may have: a longer text is not encoded.
CHARACTERS_OF_TOKEN = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a server.

    Attributes:
      max_tokens: maximum new tokens of a completion.
      max_prompt_tokens: maximum tokens of a prompt.
      max_completions: maximum completions of a request: its prompts times n.
      max_body_bytes: maximum size of a request.
      max_queue: maximum completions that wait; further requests get the status 429.
      timeout: seconds from a request's arrival to its last token; later it is ended with the status 504.
      batch_size: completions that are generated at a time.
    """

    max_tokens: int = 1024
    max_prompt_tokens: int = 8192
    max_completions: int = 64
    max_body_bytes: int = 4_000_000
    max_queue: int = 256
    timeout: float = 600.0
    batch_size: int = 8

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 1 if type(field.default) is int else 0.001
            if not least <= value < float("inf"):
                raise ValueError(f"--{field.name}={value} must be at least {least}, and finite.")
        if self.max_completions > self.max_queue:
            raise ValueError(
                f"--max_completions={self.max_completions} would never fit into --max_queue={self.max_queue}: raise it."
            )
