"""A model loaded from a checkpoint, with the vocabulary and chat template that turn rows into tokens."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.common import end_tokens

EXAMPLE = '{"text": "..."}, {"messages": [{"role": "user", "content": "..."}]} or {"tokens": [...]}'
_KEYS = ("tokens", "text", "messages")


class LoadError(ValueError):
    """A checkpoint that cannot be used with these settings, or rows that the model cannot read."""


@dataclasses.dataclass(kw_only=True)
class LoadedRun:
    """A model with its parameters.

    Attributes:
      config: a `launch.load.load_run.RunConfig`.
      params: restored, on the mesh.
      meta: the run's record with the checkpoint.
      row_sharding: sharding of the rows of a batch; None on one device.
      row_shards: the number of rows in a batch must be a multiple of this.
    """

    config: Any
    params: Any
    meta: Mapping[str, Any]
    row_sharding: Any
    row_shards: int

    @property
    def model(self) -> Any:
        return self.config.model

    @property
    def size(self) -> int:
        """The number of parameters."""
        import jax

        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def unroll(self) -> None:
        """Replaces stacked layers by unrolled ones, once for several decoders and scorers of the run."""
        import jax

        from espalier.model.transforms import layer_stack

        model, config = self.model, self.model.config
        if config.scan_layers:
            self.params = jax.jit(lambda params: layer_stack.unroll(params, config))(self.params)
            self.config = dataclasses.replace(self.config, model=layer_stack.unrolled(model))

    @property
    def encodes(self) -> bool:
        """Whether the model is an encoder-decoder."""
        return self.model.row.encodes

    @property
    def start_token(self) -> int | None:
        """The token before the first token of a document; None for no such token."""
        start = self.config.start_token
        return self.meta.get("start_token", 0) if start == "auto" else start

    @property
    def add_bos(self) -> bool:
        """Whether texts begin with BOS."""
        chosen = self.config.add_bos
        return bool(self.meta.get("add_bos", False) if chosen is None else chosen)

    @functools.cached_property
    def vocabulary_or_none(self) -> Any:
        """The vocabulary of the run's data, or None if its configuration has none.

        Raises:
          LoadError: the model was trained with another vocabulary.
        """
        vocabulary = self.config.vocabulary()
        if vocabulary is not None:
            self._check(vocabulary)
        return vocabulary

    @property
    def vocabulary(self) -> Any:
        """The vocabulary of the run's data; raises LoadError also if its configuration has none."""
        if self.vocabulary_or_none is None:
            raise LoadError(
                "The run's configuration sets no VOCABULARY: give tokens in place of texts, or "
                "--gin.VOCABULARY='@vocabularies.byte()' (in Python: vocabulary=vocabularies.byte()) or another in "
                "data/tokenizers/vocabularies.py."
            )
        return self.vocabulary_or_none

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All ids that end a continuation; empty without a vocabulary or its EOS."""
        return end_tokens.eos_ids(self.vocabulary_or_none)

    def _check(self, vocabulary: Any) -> None:
        from espalier.data.stream import rows

        name = f"{type(vocabulary).__name__} of {vocabulary.vocab_size} entries"
        trained = self.meta.get("vocabulary")
        if trained is not None and trained != rows.vocabulary_digest(vocabulary):
            raise LoadError(
                f"The checkpoint was trained with another vocabulary than this {name}: its tokens "
                "would mean other texts. Use the vocabulary in the run's directory (or train it again from the same "
                "corpus and settings), or give tokens in place of texts."
            )
        size = self.model.config.vocab_size
        if vocabulary.vocab_size > size:
            raise LoadError(
                f"The vocabulary, {name}, does not fit the model's table of {size} rows."
            )

    @functools.cached_property
    def chat_template(self) -> Any:
        """The `data.tokenizers.chat_template.ChatTemplate` that renders "messages"; raises LoadError without one."""
        from espalier.data.tokenizers import chat_template

        try:
            template = chat_template.of(
                self.config.chat_template,
                self.vocabulary,
                special_in_contents=self.config.special_tokens == "everywhere",
            )
        except chat_template.ChatTemplateError as error:
            raise LoadError(f"CHAT_TEMPLATE: {error}.") from None
        if template is None:
            raise LoadError(
                'The run\'s vocabulary has no chat template for "messages": set CHAT_TEMPLATE '
                "(of a command: --gin.CHAT_TEMPLATE='\"...\"') to the path of a jinja file or the name of a built-in one, "
                f'{", ".join(map(repr, chat_template.BUILT_IN))}, or give "text" '
                "in the format of the training texts."
            )
        return template

    def tokens(self, row: Mapping[str, Any], where: str) -> list[int]:
        """Returns the tokens of a row's "tokens", "text" or "messages", as a prompt.

        A text begins with one BOS if the run's texts did. "messages" are rendered, with the row's "tools" and
        "documents", up to the beginning of the assistant's next turn; the template writes BOS if the model
        expects it.

        Raises:
          LoadError: none or several of these keys, a malformed value, or messages that the template refuses.
        """
        key = self._key(row, where)
        if key == "messages":
            return self._encode_rendered(
                self._render(row, where, row["messages"], add_generation_prompt=True)
            )[0]
        ids = self.encode(row[key], f"{where}: {key!r}")
        return self.after_bos(ids) if key == "text" else ids

    def scored(self, row: Mapping[str, Any], where: str) -> tuple[list[int], list[int] | None]:
        """Returns the tokens of a row, and the targets after them to score; None to score all tokens.

        Targets are the row's "targets", or the assistant's turn that ends its "messages", up to and
        including its end token.

        Raises:
          LoadError: see `tokens` and `encode`; or the template renders this turn differently after a generation prompt.
        """
        if "targets" in row:
            return self.tokens(row, where), self.encode(row["targets"], f"{where}: 'targets'")
        if self._key(row, where) != "messages":
            return self.tokens(row, where), None
        messages = row["messages"]
        rendered = self._render(row, where, messages)
        if messages[-1]["role"] != "assistant" or len(messages) == 1:
            return self._encode_rendered(rendered)[0], None
        before = self._render(row, where, messages[:-1], add_generation_prompt=True).text
        if not rendered.text.startswith(before):
            raise LoadError(
                f"{where}: the chat template renders the assistant's last turn otherwise than after a "
                'generation prompt, so it cannot be separated. Give "text" and "targets".'
            )
        context, targets = self._encode_rendered(rendered, len(before))
        ends = [place for place, id in enumerate(targets, 1) if id in self.eos_ids]
        return context, targets[: ends[-1]] if ends else targets

    def _render(self, row: Mapping[str, Any], where: str, messages: Any, **options: Any) -> Any:
        from espalier.data.tokenizers.chat_template import ChatTemplateError

        options |= {key: row.get(key) for key in ("tools", "documents")}
        try:
            return self.chat_template.rendered(messages, **options)
        except ChatTemplateError as error:
            raise LoadError(f"{where}: {error}.") from None

    def _encode_rendered(
        self, rendered: Any, start: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Returns the ids of a rendered conversation before and after the character `start`; None for its end.

        A token that extends past `start` is in the second part, if the vocabulary knows which characters a token covers.
        """
        from espalier.data.tokenizers import control_tokens

        end = len(rendered.text)
        spans = ((end if start is None else start, end),)
        ids, marked = control_tokens.encode(
            self.vocabulary, dataclasses.replace(rendered, spans=spans)
        )
        before = marked.index(True) if True in marked else len(ids)
        if hasattr(self.vocabulary, "encode_marked"):  # the template writes BOS
            return ids[:before], ids[before:]
        return self.after_bos(ids[:before]), ids[before:]

    def _key(self, row: Mapping[str, Any], where: str) -> str:
        keys = [key for key in _KEYS if key in row]
        if len(keys) != 1:
            raise LoadError(
                f'{where}: expected either "tokens", "text" or "messages", as in {EXAMPLE}.'
            )
        return keys[0]

    def after_bos(self, ids: list[int]) -> list[int]:
        """Returns the ids of a text, with BOS in front if texts begin with it."""
        if not self.add_bos:
            return ids
        if (bos := self.vocabulary.bos_id) in (None, -1):
            raise LoadError("ADD_BOS is set, but the run's vocabulary has no BOS: set it to False.")
        return ids if ids[:1] == [bos] else [bos, *ids]

    def encode(self, value: Any, where: str, *, as_text: bool = False) -> list[int]:
        """Returns the ids of a text, or a list of ids; raises LoadError if `value` is neither.

        With `as_text`, special tokens that the text spells are text, as with `special_tokens='nowhere'`.
        """
        if isinstance(value, str):
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise LoadError(
                    f"{where} is not valid Unicode at character {error.start} (half of a surrogate "
                    "pair). Repair or drop it."
                ) from None
            if as_text or self.config.special_tokens == "nowhere":
                from espalier.data.tokenizers import control_tokens

                plain = control_tokens.as_text(value, self._added_tokens)
                return control_tokens.encode(self.vocabulary, plain)[0]
            return list(self.vocabulary.encode(value))
        if not isinstance(value, list) or not all(type(id) is int for id in value):
            raise LoadError(f"{where} is neither a text nor a list of token ids.")
        size = self.model.config.vocab_size
        if wrong := [id for id in value if not 0 <= id < size]:
            raise LoadError(f"{where} holds the id {wrong[0]}, outside the model's {size} rows.")
        return value

    @functools.cached_property
    def _added_tokens(self) -> Mapping[str, bool]:
        from espalier.data.tokenizers import control_tokens

        return control_tokens.of(self.vocabulary)

    def context(self, tokens: Sequence[int]) -> list[int]:
        """Returns the tokens with the document's start token in front, if the model has one."""
        start = self.start_token
        return list(tokens) if start is None else [start, *tokens]

    def encoder_inputs(self, row: Mapping[str, Any], where: str) -> list[int]:
        """Returns the tokens that an encoder reads: `prefixed`, of the row's "inputs", or as `tokens`. A text ends with EOS.

        Raises:
          LoadError: the row has no inputs, or malformed ones.
        """
        text = isinstance(row.get("inputs", row.get("text")), str)
        if "inputs" in row:
            ids = self.encode(row["inputs"], f"{where}: 'inputs'")
        else:
            ids = self.tokens(row, where)
        if text and self.vocabulary.eos_id not in (None, -1, *ids[-1:]):
            ids = [*ids, self.vocabulary.eos_id]
        if not ids:
            raise LoadError(f"{where}: the inputs are empty: an encoder reads at least one token.")
        return self.prefixed(ids)

    @functools.cached_property
    def inputs_prefix(self) -> tuple[int, ...]:
        """The virtual tokens with which an encoder's inputs begin; empty without them."""
        return self.model.inputs_prefix

    def prefixed(self, inputs: Sequence[int]) -> list[int]:
        """Returns an encoder's inputs after `inputs_prefix`."""
        return [*self.inputs_prefix, *inputs]

    def batch_size(self, wanted: int, rows: int) -> int:
        """Returns `wanted` or the number of rows, if smaller, rounded up to a multiple for the mesh."""
        if wanted < 1:
            raise LoadError(f"--batch_size={wanted} must be at least 1.")
        return -(-max(1, min(wanted, rows)) // self.row_shards) * self.row_shards
