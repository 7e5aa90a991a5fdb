"""A Hugging Face tokenizer as a vocabulary, for tasks, token caches, and reading runs.

`data.tokenizers.vocabularies.huggingface` makes it. For caches and checkpoints, two vocabularies
are equal if they assign the same ids to the same texts; see `model_bytes`.
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from espalier.data.tokenizers import chat_template, control_tokens, hf_tokenizer
from espalier.data.tokenizers.chat_sandbox import Rendered
from espalier.data.tokenizers.vocabulary import Vocabulary, as_list


class HFTokenizerVocabulary(Vocabulary):
    """A vocabulary of a tokenizer.json and its accompanying files.

    `encode` adds no special tokens, as in all vocabularies; tasks add BOS and EOS. `decode`
    stops after the first EOS; `decode_all` does not.

    Attributes:
      files: the content of the files.
      special_in_text: whether special tokens spelled in a text are encoded as special tokens. Set
        it to False for untrusted texts, which must not end a turn. Those that a chat template writes
        are special tokens all the same, see `encode_marked`.
    """

    library = "tokenizers"

    def __init__(
        self, path: str | os.PathLike, *, extra_ids: int = 0, special_in_text: bool | None = None
    ):
        """Reads the files in a directory; raises what `hf_tokenizer.read` and `load` raise."""
        super().__init__(extra_ids)
        self.files = hf_tokenizer.read(path)
        default = self.files.special_in_text
        self.special_in_text = default if special_in_text is None else special_in_text
        self._size = hf_tokenizer.num_ids(hf_tokenizer.load(self.files.content))
        self._ids = {name: self.files.id(f"{name}_token") for name in ("bos", "eos", "pad", "unk")}
        self._tokenizer()  # raises now, not at the first text, if the extra ids do not fit

    @property
    def model_bytes(self) -> bytes:
        """Bytes that, with the special ids and the number of extra ids, determine all ids."""
        return self.files.content + (b"" if self.special_in_text else b"\nspecial tokens are text")

    @property
    def bos_id(self) -> int | None:  # type: ignore[override]
        return self._ids["bos"]

    @property
    def eos_id(self) -> int | None:  # type: ignore[override]
        return self._ids["eos"]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All ids that end a continuation; `eos_id` ends a document."""
        return self.files.eos_ids

    @property
    def pad_id(self) -> int | None:  # type: ignore[override]
        return self._ids["pad"]

    @property
    def unk_id(self) -> int | None:  # type: ignore[override]
        return self._ids["unk"]

    @property
    def adds_bos(self) -> bool:
        """Whether the model expects BOS before a text."""
        return self.files.adds_bos

    @property
    def chat_template(self) -> chat_template.ChatTemplate | None:
        return self.files.chat_template

    @property
    def _base_vocab_size(self) -> int:
        return self._size

    @property
    def spellings(self) -> dict[int, str]:
        """The tokens as the tokenizer spells them, by id, without those that were added to it."""
        tokenizer = self._tokenizer()
        spelled = tokenizer.get_vocab(with_added_tokens=False)
        added = tokenizer.get_added_tokens_decoder()
        return {id: text for text, id in spelled.items() if id not in added}

    @property
    def added_tokens(self) -> dict[str, bool]:
        """The tokens that were added to the tokenizer, and whether each is marked as special."""
        added = self._tokenizer().get_added_tokens_decoder().values()
        return {token.content: token.special for token in added}

    def _tokenizer(self, special_in_text: bool | None = None):
        if special_in_text is None:
            special_in_text = self.special_in_text
        return hf_tokenizer.load(self.files.content, self.extra_ids, special_in_text)

    def encode(self, s: str) -> list[int]:
        with hf_tokenizer.failures(self.files.path):
            return self._tokenizer().encode(s, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        with hf_tokenizer.failures(self.files.path):
            encoded = self._tokenizer().encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, np.int32) for each in encoded]

    def encode_marked(self, rendered: Rendered) -> tuple[list[int], list[bool]]:
        """Returns the ids of a rendered conversation, and for each whether it overlaps one of the spans.

        Raises:
          CheckpointFileError: contents spell control tokens, and have private-use characters.
        """
        text, written = rendered.text, rendered.written
        usual = self._tokenizer(special_in_text=True)
        with hf_tokenizer.failures(self.files.path):
            encoding = usual.encode(text, add_special_tokens=False)
        if written is not None:
            ids = {token: usual.token_to_id(token) for token in written.tokens}
            if written.spelled or not control_tokens.is_as_written(written, encoding.ids, ids):
                text = control_tokens.named(written, text)
                content = control_tokens.renamed_tokenizer(self.files.content, written.tokens)
                renamed = hf_tokenizer.load(content, self.extra_ids)
                with hf_tokenizer.failures(self.files.path):
                    encoding = renamed.encode(text, add_special_tokens=False)
        covered = np.zeros(len(text) + 1, bool)
        for start, end in rendered.spans or ():
            covered[start:end] = True
        return encoding.ids, [
            bool(covered[start : max(end, start + 1)].any()) for start, end in encoding.offsets
        ]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Returns the text up to and including the first EOS; skips ids outside the vocabulary."""
        ids = as_list(ids)
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id) + 1]
        return self.decode_all(ids, skip_special_tokens=skip_special_tokens)

    def decode_all(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Returns the text of all ids; skips ids outside the vocabulary."""
        known = [int(id) for id in as_list(ids) if 0 <= id < self.vocab_size]
        with hf_tokenizer.failures(self.files.path):
            return self._tokenizer().decode(known, skip_special_tokens=skip_special_tokens)

    def encode_tf(self, s: Any) -> Any:
        import tensorflow as tf

        def encode(text: bytes) -> np.ndarray:
            return np.asarray(self.encode(text.decode("utf-8")), np.int32)

        ids = tf.numpy_function(encode, [s], tf.int32)
        ids.set_shape([None])
        return ids

    def decode_tf(self, ids: Any) -> Any:
        """Applies `decode` along the last axis of an integer tensor; returns a string tensor."""
        import tensorflow as tf

        ids = tf.convert_to_tensor(ids)

        def decode(rows: np.ndarray) -> np.ndarray:
            texts = [self.decode(row).encode() for row in rows.reshape(-1, rows.shape[-1]).tolist()]
            return np.asarray(texts, object).reshape(rows.shape[:-1])

        texts = tf.numpy_function(decode, [ids], tf.string)
        texts.set_shape(ids.shape[:-1])
        return texts

    _decode, _decode_tf = decode_all, decode_tf

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HFTokenizerVocabulary) and (
            (self.model_bytes, self._ids, self.extra_ids)
            == (other.model_bytes, other._ids, other.extra_ids)
        )

    def __str__(self) -> str:
        return f"HFTokenizerVocabulary({self.files.path}, size={self.vocab_size})"
