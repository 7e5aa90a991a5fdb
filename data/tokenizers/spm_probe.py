"""Tries out a SentencePiece model; runs in a child process with limits, before the model is loaded for use."""

import base64

import sentencepiece

from espalier.data.tokenizers import tokenizer_probe


def check(model: str) -> str | None:
    """Returns the problem of a model, whose bytes are given in Base64; None if it loads, encodes and decodes."""
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(model))
        for text in tokenizer_probe.TEXTS:
            processor.decode(processor.encode(text))
    except MemoryError:
        raise
    except Exception as error:
        return f"{error}"[:500]
    return None
