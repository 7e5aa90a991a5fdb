"""Vocabularies that need no TensorFlow, with the interface and the ids of SeqIO's, so that SeqIO can use them too.

Caches and checkpoints know a vocabulary by the digest of its class's name and state (`data.cache.fingerprint.vocabulary`);
the classes here are known as SeqIO's.
"""

import abc
import functools
import hashlib
import os
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

CACHED_AS = "seqio.vocabularies"  # the name by which caches and checkpoints know the classes
_SPECIAL = 3  # of bytes: 0 pad, 1 EOS, 2 unknown


class Vocabulary(abc.ABC):
    """What tasks, SeqIO and answering models ask of a vocabulary.

    Attributes:
      bos_id, eos_id, unk_id: of the tokens; None if there is none.
      pad_id: of padding.
      extra_ids: number of sentinels after the last piece.
      library: the package that encodes; None if it is Python.
    """

    library: str | None = None
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    pad_id: int | None = 0

    def __init__(self, extra_ids: int = 0):
        self._extra_ids = extra_ids or 0

    @property
    def extra_ids(self) -> int:
        return self._extra_ids

    @property
    def vocab_size(self) -> int:
        """Number of ids, extra ids included."""
        return self._base_vocab_size + self.extra_ids

    @property
    @abc.abstractmethod
    def _base_vocab_size(self) -> int:
        """Number of ids without the extra ids, but with pad, EOS and unknown; SeqIO's name."""

    @abc.abstractmethod
    def encode(self, s: str, /) -> Sequence[int]:
        """Returns the ids of a text, without BOS and EOS."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, int32 [T], as `encode` does."""
        return [np.array(self.encode(text), np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids up to the first EOS; ids outside the vocabulary are unknown."""
        ids = as_list(ids)
        if self.unk_id is not None:
            ids = [self.unk_id if id >= self._base_vocab_size else id for id in ids]
        if self.eos_id is not None and self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id) + 1]
        return self._decode(ids)

    @abc.abstractmethod
    def encode_tf(self, s: Any, /) -> Any:
        """Returns the ids of a string tensor, int32 [T]."""

    def decode_tf(self, ids: Any) -> Any:
        """Returns the strings of an int32 tensor [..., T], each up to its first EOS."""
        import tensorflow as tf

        if ids.shape == (0,):
            return tf.constant(b"")
        if self.unk_id is not None:
            ids = tf.where(tf.less(ids, self._base_vocab_size), ids, self.unk_id)
        if self.eos_id is not None:
            ends = tf.cast(tf.equal(ids, self.eos_id), tf.int32)
            after = tf.cumsum(ends, exclusive=True, axis=-1)
            ids = tf.where(tf.cast(after, tf.bool), self.pad_id, ids)
        return self._decode_tf(ids)

    @abc.abstractmethod
    def _decode(self, ids: Any, /) -> Any: ...

    @abc.abstractmethod
    def _decode_tf(self, ids: Any, /) -> Any: ...


def as_list(ids: Iterable[int]) -> list[int]:
    """Returns ids as a list; an eager tensor is slow to iterate over."""
    return ids.numpy().tolist() if hasattr(ids, "numpy") else list(ids)


class PassThroughVocabulary(Vocabulary):
    """Ids, or numbers, that are no text."""

    bos_id = unk_id = None

    def __init__(self, size: int, eos_id: int | None = None):
        self._size = size
        self._eos_id = eos_id
        super().__init__()

    @property
    def eos_id(self) -> int | None:  # type: ignore[override]
        return self._eos_id

    @property
    def _base_vocab_size(self) -> int:
        return self._size

    def _same(self, value: Any, /) -> Any:
        return value

    encode = encode_tf = _decode = _decode_tf = _same

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PassThroughVocabulary) and vars(self) == vars(other)

    def __str__(self) -> str:
        return f"PassThroughVocabulary(size={self._size}, eos_id={self._eos_id})"


class ByteVocabulary(Vocabulary):
    """UTF-8 bytes after pad, EOS and unknown, as of ByT5 (arXiv 2105.13626)."""

    bos_id, eos_id, unk_id = None, 1, 2

    def __init__(self, extra_ids: int = 0):
        self._byte_size, self._num_special_tokens = 256, _SPECIAL  # by which caches know it
        super().__init__(extra_ids)

    @property
    def _base_vocab_size(self) -> int:
        return 256 + _SPECIAL

    def encode(self, s: str | bytes) -> list[int]:
        return [byte + _SPECIAL for byte in (s if isinstance(s, bytes) else s.encode())]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [
            np.frombuffer(text.encode(), np.uint8).astype(np.int32) + _SPECIAL for text in texts
        ]

    def _decode(self, ids: Iterable[int]) -> str:
        """Returns the text without special tokens, and without bytes that are no character."""
        known = (int(id) - _SPECIAL for id in ids)
        return bytes(byte for byte in known if 0 <= byte < 256).decode("utf-8", "ignore")

    def encode_tf(self, s: Any) -> Any:
        import tensorflow as tf

        return tf.cast(tf.io.decode_raw(s, tf.uint8), tf.int32) + _SPECIAL

    def _decode_tf(self, ids: Any) -> Any:
        import tensorflow as tf

        known = tf.logical_and(ids >= _SPECIAL, ids < 256 + _SPECIAL)
        bytes_ = tf.ragged.boolean_mask(ids, known) - _SPECIAL
        strings = tf.gather(tf.constant([bytes([byte]) for byte in range(256)]), bytes_)
        text = tf.strings.reduce_join(strings, axis=-1)
        return tf.strings.unicode_transcode(text, "UTF-8", "UTF-8", errors="ignore")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByteVocabulary) and self.extra_ids == other.extra_ids

    def __str__(self) -> str:
        return f"ByteVocabulary(extra_ids={self.extra_ids})"


class SentencePieceVocabulary(Vocabulary):
    """The pieces of a SentencePiece model, and sentinels `<extra_id_N>` after them, the last one first as for T5.

    The model is read once and travels with a pickled vocabulary.

    Attributes:
      sentencepiece_model_file: path of the model.
      sp_model: its bytes, sentinels included.
    """

    library = "sentencepiece"

    def __init__(self, path: str | os.PathLike, extra_ids: int = 0, sp_model: bytes | None = None):
        """Reads the model, unless it is given; raises OSError, and protobuf's and SentencePiece's errors."""
        super().__init__(extra_ids)
        self.sentencepiece_model_file = os.fspath(path)
        if sp_model is None:
            with open(path, "rb") as file:
                sp_model = _with_sentinels(file.read(), self.extra_ids)
        self.sp_model = sp_model
        _ = self.tokenizer

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The `SentencePieceProcessor`."""
        return _processor(self.sp_model)

    def __reduce__(self) -> Any:
        return type(self), (self.sentencepiece_model_file, self.extra_ids, self.sp_model)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state of SeqIO's class, which compares itself with others by it."""
        return {
            "_sentencepiece_model_file": self.sentencepiece_model_file,
            "_normalizer_spec_overrides": None,
            "_reverse_extra_ids": True,
            "_use_fast_tokenizer": False,
            "_extra_ids": self.extra_ids,
        }

    @property
    def bos_id(self) -> int:  # type: ignore[override]
        return self.tokenizer.bos_id()

    @property
    def eos_id(self) -> int:  # type: ignore[override]
        return self.tokenizer.eos_id()

    @property
    def unk_id(self) -> int:  # type: ignore[override]
        return self.tokenizer.unk_id()

    @property
    def _base_vocab_size(self) -> int:
        return self.tokenizer.GetPieceSize()

    @property
    def vocab_size(self) -> int:
        """Number of ids; the sentinels are pieces."""
        return self._base_vocab_size

    @property
    def tf_tokenizer(self) -> Any:
        import tensorflow_text as tf_text

        return tf_text.SentencepieceTokenizer(model=self.sp_model)

    def encode(self, s: str) -> list[int]:
        return self.tokenizer.EncodeAsIds(s)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self.tokenizer.Encode(list(texts), out_type=int, num_threads=1)
        return [np.array(ids, np.int32) for ids in encoded]

    def _decode(self, ids: Iterable[int]) -> str:
        size, unknown = self._base_vocab_size, self.unk_id
        return self.tokenizer.DecodeIds([unknown if id >= size else int(id) for id in ids])

    def encode_tf(self, s: Any) -> Any:
        return self.tf_tokenizer.tokenize(s)

    def _decode_tf(self, ids: Any) -> Any:
        return self.tf_tokenizer.detokenize(ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SentencePieceVocabulary) and (
            (self.sp_model, self.extra_ids) == (other.sp_model, other.extra_ids)
        )

    def __str__(self) -> str:
        md5 = hashlib.md5(self.sp_model).hexdigest()
        return (
            f"SentencePieceVocabulary(file={self.sentencepiece_model_file}, extra_ids={self.extra_ids}, "
            f"spm_md5={md5})"
        )


def _with_sentinels(model: bytes, extra_ids: int) -> bytes:
    """Returns a model in protobuf's own order of fields, as caches know it, with sentinels after its pieces."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
    for number in reversed(range(extra_ids)):
        proto.pieces.add(piece=f"\u2581<extra_id_{number}>", score=0.0, type=kind)
    return proto.SerializeToString()


_loading = threading.Lock()  # SentencePiece loads no two models at once


@functools.lru_cache(maxsize=64)
def _processor(model: bytes) -> Any:
    import sentencepiece

    with _loading:
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(model)
        return processor
