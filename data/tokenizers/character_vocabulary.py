"""A fixed set of characters as a SeqIO vocabulary; see `data.tokenizers.vocabularies.characters`."""

from collections.abc import Iterable, Sequence

import numpy as np
import seqio
import tensorflow as tf

_SPECIAL = 3  # 0 pad, 1 EOS, 2 unknown, as in seqio.ByteVocabulary


class CharacterVocabulary(seqio.Vocabulary):
    """Maps each character of `symbols` to one id, in order; any other character is unknown.

    Raises:
      ValueError: there are no characters, or a character is repeated.
    """

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
    def bos_id(self) -> None:
        return None

    @property
    def eos_id(self) -> int:
        return 1

    @property
    def unk_id(self) -> int:
        return 2

    @property
    def _base_vocab_size(self) -> int:
        return len(self.symbols) + _SPECIAL

    def _encode(self, s: str) -> list[int]:
        return [self._id_of.get(symbol, self.unk_id) for symbol in s]

    def _decode(self, ids: Iterable[int]) -> str:
        return "".join(self._texts[id] for id in ids)

    @property
    def _texts(self) -> Sequence[str]:
        """Id -> its text: empty for pad and EOS, `?` or U+FFFD for unknown characters."""
        return ["", "", "?" if "?" not in self.symbols else "\ufffd", *self.symbols]

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        points = [ord(symbol) for symbol in self.symbols]
        beyond = max(points) + 1
        table = np.full(beyond + 1, self.unk_id, np.int32)
        table[points] = np.arange(len(points)) + _SPECIAL
        return tf.gather(table, tf.minimum(tf.strings.unicode_decode(s, "UTF-8"), beyond))

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return tf.strings.reduce_join(tf.gather(tf.constant(self._texts), ids), axis=-1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CharacterVocabulary) and self.symbols == other.symbols

    def __str__(self) -> str:
        return f"CharacterVocabulary({self.symbols!r})"
