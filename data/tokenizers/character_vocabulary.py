"""A fixed set of characters as a vocabulary; see `data.tokenizers.vocabularies.characters`."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from espalier.data.tokenizers.vocabulary import Vocabulary

_SPECIAL = 3  # 0 pad, 1 EOS, 2 unknown, as of bytes


class CharacterVocabulary(Vocabulary):
    """Maps each character of `symbols` to one id, in order; any other character is unknown.

    Raises:
      ValueError: there are no characters, or a character is repeated.
    """

    bos_id, eos_id, unk_id = None, 1, 2

    def __init__(self, symbols: str):
        super().__init__()
        if not symbols or len(set(symbols)) != len(symbols):
            raise ValueError(f"symbols = {symbols!r} must be different characters.")
        self.symbols = symbols
        self._id_of = {symbol: i + _SPECIAL for i, symbol in enumerate(symbols)}

    @property
    def model_bytes(self) -> bytes:
        """Bytes that determine the ids, for the fingerprint of token caches."""
        return self.symbols.encode()

    @property
    def _base_vocab_size(self) -> int:
        return len(self.symbols) + _SPECIAL

    def encode(self, s: str) -> list[int]:
        return [self._id_of.get(symbol, self.unk_id) for symbol in s]

    def _decode(self, ids: Iterable[int]) -> str:
        return "".join(self._texts[id] for id in ids)

    @property
    def _texts(self) -> Sequence[str]:
        """Id -> its text: empty for pad and EOS, `?` or U+FFFD for unknown characters."""
        return ["", "", "?" if "?" not in self.symbols else "\ufffd", *self.symbols]

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """Code point -> its id, int32, up to the first one beyond all symbols."""
        points = [ord(symbol) for symbol in self.symbols]
        table = np.full(max(points) + 2, self.unk_id, np.int32)
        table[points] = np.arange(len(points)) + _SPECIAL
        return table

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        points = (np.frombuffer(text.encode("utf-32-le"), np.uint32) for text in texts)
        return [self._table[np.minimum(each, len(self._table) - 1)] for each in points]

    def encode_tf(self, s: Any) -> Any:
        import tensorflow as tf

        points = tf.strings.unicode_decode(s, "UTF-8")
        return tf.gather(self._table, tf.minimum(points, len(self._table) - 1))

    def _decode_tf(self, ids: Any) -> Any:
        import tensorflow as tf

        return tf.strings.reduce_join(tf.gather(tf.constant(self._texts), ids), axis=-1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CharacterVocabulary) and self.symbols == other.symbols

    def __str__(self) -> str:
        return f"CharacterVocabulary({self.symbols!r})"
