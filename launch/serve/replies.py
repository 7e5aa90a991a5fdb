"""The JSON of replies, as the OpenAI API has it: whole completions, and pieces of a stream."""

import itertools
import json
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from espalier.launch.serve.engine import Completed
from espalier.launch.serve.requests import Asked
from espalier.trainers.decoding.stop_strings import BROKEN, GrowingText

DONE = b"data: [DONE]\n\n"


def event(body: dict[str, Any]) -> bytes:
    """Returns an event of a stream (server-sent events)."""
    return f"data: {json.dumps(body)}\n\n".encode()


class Replies:
    """The bodies of the replies to one request.

    Args:
      asked: the request.
      model: name of the served model.
      prompt_tokens: number of tokens of all prompts.
      decode: returns the text of tokens, for log-probabilities.
    """

    def __init__(
        self,
        asked: Asked,
        *,
        model: str,
        prompt_tokens: int,
        decode: Callable[[Sequence[int]], str],
    ):
        self._asked, self._prompt_tokens, self._decode = asked, prompt_tokens, decode
        kind = "chat.completion" if asked.chat else "text_completion"
        name = "chatcmpl" if asked.chat else "cmpl"
        self._head = {
            "id": f"{name}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        self._piece_head = {**self._head, "object": f"{kind}.chunk" if asked.chat else kind}

    def whole(self, completed: Sequence[Completed]) -> dict[str, Any]:
        """Returns the body of a reply that is not streamed."""
        choices = []
        for index, one in enumerate(completed):
            text: dict[str, Any] = {"text": one.text}
            if self._asked.chat:
                text = {"message": {"role": "assistant", "content": one.text, "refusal": None}}
            choices.append({"index": index, **text, **self._end(one)})
        return {**self._head, "choices": choices, "usage": self._usage(completed)}

    def first(self, index: int) -> dict[str, Any] | None:
        """Returns the first piece of a stream of messages; None for texts, which have none."""
        if not self._asked.chat:
            return None
        return self._piece(index, {"delta": {"role": "assistant", "content": ""}})

    def piece(self, index: int, text: str) -> dict[str, Any]:
        """Returns a piece of a stream."""
        return self._piece(
            index, {"delta": {"content": text}} if self._asked.chat else {"text": text}
        )

    def last(self, index: int, one: Completed) -> dict[str, Any]:
        """Returns the last piece of a completion, which says how it ended."""
        text = {"delta": {}} if self._asked.chat else {"text": ""}
        return self._piece(index, text, self._end(one))

    def usage(self, completed: Sequence[Completed]) -> dict[str, Any]:
        """Returns the piece after all others, with the number of tokens."""
        return {**self._piece_head, "choices": [], "usage": self._usage(completed)}

    def _piece(self, index: int, text: dict[str, Any], end: dict[str, Any] | None = None) -> dict:
        end = end or {"finish_reason": None, "logprobs": None}
        return {**self._piece_head, "choices": [{"index": index, **text, **end}]}

    def _end(self, one: Completed) -> dict[str, Any]:
        reason = "length" if one.ended == "length" else "stop"
        log_probs = self._log_probs(one) if self._asked.log_probs else None
        return {"finish_reason": reason, "logprobs": log_probs}

    def _log_probs(self, one: Completed) -> dict[str, Any]:
        texts = [self._decode([token]) for token in one.tokens]
        if self._asked.chat:
            pairs = zip(texts, one.log_probs, strict=True)
            content = [
                {
                    "token": t,
                    "logprob": p,
                    # The bytes of a part of a character are unknown.
                    "bytes": None if BROKEN in t else list(t.encode()),
                    "top_logprobs": [],
                }
                for t, p in pairs
            ]
            return {"content": content, "refusal": None}
        # A token can be a part of a character, which is then at the offset of each of its parts.
        growing = GrowingText(self._decode)
        sizes = [len(growing.add(token)) for token in one.tokens]
        offsets = list(itertools.accumulate(sizes[:-1], initial=0))[: len(texts)]
        values = list(one.log_probs)
        return {
            "tokens": texts,
            "token_logprobs": values,
            "top_logprobs": None,
            "text_offset": offsets,
        }

    def _usage(self, completed: Sequence[Completed]) -> dict[str, int]:
        new = sum(len(one.tokens) for one in completed)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self._prompt_tokens + new,
        }
