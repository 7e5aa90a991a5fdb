"""Teachers of a pool at work: checkpoints in this process, and endpoints over HTTP."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from espalier.data.aya_expanse.pool import Teacher
from espalier.data.aya_expanse.prompts import Prompt
from espalier.data.cache import fingerprint
from espalier.data.text.documents import DataError, check_unicode
from espalier.data.tokenizers import chat_template
from espalier.launch.inference.chat_endpoint import ChatEndpoint, ChatReply, Silence, api_key

# Requests in a row without a reply after which an endpoint is not asked further.
_PATIENCE = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How completions are sampled; a teacher of the pool may have its own values.

    Attributes:
      max_tokens: maximum number of new tokens of a completion.
      temperature: temperature of sampling; 0 for greedy completions.
      top_p: draws among the fewest tokens whose probabilities sum to at least p.
      seed: random seed of sampling; a completion depends on it and on the prompt's text.
    """

    max_tokens: int = 512
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self):
        if self.max_tokens < 1:
            raise ValueError(f"--max_tokens={self.max_tokens} must be at least 1.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature={self.temperature} must be 0 or positive, and finite.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p={self.top_p} must be above 0, and 1 at most.")

    def of(self, teacher: Teacher) -> "SamplingFlags":
        """Returns the settings of a teacher."""
        names = ("max_tokens", "temperature", "top_p")
        own = {n: getattr(teacher, n) for n in names if getattr(teacher, n) is not None}
        return dataclasses.replace(self, **own)


class Working(Protocol):
    """A teacher that can be asked.

    Attributes:
      teacher: its entry in the pool.
      sampling: its settings.
      identity: JSON of everything besides the prompt and the seed that its answers depend on.
      local: whether it uses this machine's devices, so that one works at a time.
    """

    teacher: Teacher
    sampling: SamplingFlags
    identity: Mapping[str, Any]
    local: bool

    def close(self) -> None:
        """Ends `answers` in another thread, and those to come."""

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, ChatReply | Silence]]:
        """Yields (index, answer) of each prompt, in the order in which they finish.

        Raises:
          ValueError, OSError: of this project: further prompts would fail too.
        """


def key_of(working: Working, prompt: Prompt) -> str:
    """Returns the digest of everything that a completion depends on."""
    return fingerprint.of_json([working.identity, prompt.prompt, working.sampling.seed])[:32]


def at_work(teacher: Teacher, sampling: SamplingFlags) -> Working:
    """Returns a teacher that can be asked.

    Raises:
      EndpointError: a malformed URL, or no key.
      FileNotFoundError, LoadError and others: the checkpoint cannot be read.
    """
    of_kind = EndpointTeacher if teacher.kind == "url" else CheckpointTeacher
    return of_kind(teacher, sampling.of(teacher))


class EndpointTeacher:
    """An OpenAI-compatible endpoint; see `Working`."""

    local = False

    def __init__(self, teacher: Teacher, sampling: SamplingFlags):
        self.teacher, self.sampling = teacher, sampling
        self._endpoint = ChatEndpoint(
            teacher.where,
            model=teacher.model or "",
            key=api_key(teacher.key_env, teacher.key_file),
            timeout=teacher.timeout,
            retries=teacher.retries,
            concurrency=teacher.concurrency,
            owner=f"the teacher {teacher.name!r}",
        )
        self._body = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
        }
        self.identity = {
            "kind": "url",
            "url": self._endpoint.url,
            "model": teacher.model,
            **self._body,
        }

    def close(self) -> None:
        self._endpoint.close()

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, ChatReply | Silence]]:
        bodies = [
            {
                "messages": prompt.messages,
                **self._body,
                "seed": (self.sampling.seed + int(prompt.digest, 16)) % 2**31,
            }
            for prompt in prompts
        ]
        for i, reply in self._endpoint.ask_each(bodies, patience=_PATIENCE):
            if isinstance(reply, Silence):
                yield i, reply
                continue
            try:
                check_unicode(reply.text, "content", self.teacher.name)
            except DataError:
                yield i, Silence(reason="the reply is not valid Unicode")
                continue
            yield i, reply


class CheckpointTeacher:
    """A run or a Hugging Face checkpoint; see `Working`. Prompts are turns of a user if its model has a chat template, else texts."""

    local = True

    def __init__(self, teacher: Teacher, sampling: SamplingFlags):
        from espalier.launch.evaluate.judges.checkpoint import weights_identity
        from espalier.launch.load import load_run

        self.teacher, self.sampling = teacher, sampling
        # A newer step would change the answers.
        self._step = load_run.place(teacher.where)
        text = load_run.configuration_of(self._step).text
        template = teacher.chat_template
        if template is not None and template not in chat_template.BUILT_IN:  # a file
            template = chat_template.named(template).templates[chat_template.DEFAULT]
        self.identity = {
            "kind": "checkpoint",
            **weights_identity(self._step, settings=text, params="auto"),
            "chat_template": template,
            **{name: getattr(sampling, name) for name in ("max_tokens", "temperature", "top_p")},
        }

    def close(self) -> None:
        """Does nothing: checkpoints answer in the main thread."""

    def loaded(self) -> contextlib.AbstractContextManager[Any]:
        """Returns a context manager with the `LoadedRun`, in which prompts and answers spell no control tokens."""
        from espalier.launch.load import load_run

        config = dataclasses.replace(load_run.config_of(self._step), special_tokens="nowhere")
        if self.teacher.chat_template is not None:
            config = dataclasses.replace(config, chat_template=self.teacher.chat_template)
        return config.load(self._step, encoder_decoders=True)

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, ChatReply | Silence]]:
        from espalier.launch.inference import generate
        from espalier.launch.load import load_run
        from espalier.trainers.decoding.settings import Sampling, Settings

        sampling = self.sampling
        top_p = None if sampling.top_p == 1 or sampling.temperature == 0 else sampling.top_p
        settings = Settings(
            max_new_tokens=sampling.max_tokens,
            sampling=Sampling(temperature=sampling.temperature, top_p=top_p),
        )
        with self.loaded() as loaded:
            rows, lengths = [], {}
            for i, prompt in enumerate(prompts):
                row = row_of(loaded, prompt)
                try:
                    lengths[i] = _checked_length(loaded, row, prompt, sampling.max_tokens)
                except load_run.LoadError as error:
                    yield i, Silence(reason=str(error))
                    continue
                rows.append((prompt.where, row))
            if not rows:
                return
            # Prompts of similar length share a batch, whose answers are then yielded together.
            places = list(lengths)
            order = sorted(range(len(rows)), key=lambda r: -lengths[places[r]])
            decoder, texts = generate.decoder_and_texts(
                loaded,
                generate.Decoding(settings=settings, batch_size=self.teacher.batch_size),
                rows=len(rows),
            )
            continued = generate.continued(
                loaded,
                decoder,
                texts,
                [rows[r] for r in order],
                num_samples=1,
                seed=sampling.seed,
                indices=[int(prompts[places[r]].digest, 16) % 2**32 for r in order],
            )
            for r, row in zip(order, continued, strict=True):
                i = places[r]
                tokens = {"prompt_tokens": lengths[i], "new_tokens": len(row["tokens"])}
                yield i, ChatReply(text=row["text"], ended=row["ended"], **tokens)


def row_of(loaded: Any, prompt: Prompt) -> dict[str, Any]:
    """Returns a prompt as a row of `espalier generate`: messages if the model converses, else a text."""
    is_chat = loaded.config.converses or not isinstance(prompt.prompt, str)
    return {"messages": prompt.messages} if is_chat else {"text": prompt.prompt}


def _checked_length(loaded: Any, row: Mapping[str, Any], prompt: Prompt, new: int) -> int:
    """Returns the number of tokens of a prompt; raises LoadError if the model cannot continue it."""
    from espalier.launch.inference.generate import prompt_of
    from espalier.launch.load.load_run import LoadError

    length, limit = len(prompt_of(loaded, row, prompt.where)), loaded.model.max_length
    if limit is not None and length + new - 1 > limit:
        raise LoadError(f"the prompt and {new} new tokens are longer than {limit} positions")
    return length
