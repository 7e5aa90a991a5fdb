"""The tokenizer files of a Hugging Face checkpoint, without TensorFlow.

`read` takes them from a directory:

    tokenizer.json             the tokenizer, which the library `tokenizers` runs
    tokenizer_config.json      names of its special tokens, whether texts begin with BOS, chat template
    special_tokens_map.json    those names, for those that tokenizer_config.json leaves out
    chat_template.jinja        the chat template where it is not in tokenizer_config.json, and
    additional_chat_templates/ further ones by name
    generation_config.json     ids that end a continuation, else config.json's, else the tokenizer's EOS

Ids are those of tokenizer.json. The model's table may be larger: its last rows are padding. Encoding
adds no special tokens; whether the model expects BOS before a text is `adds_bos`. Special tokens that
are spelled in a text are encoded as such, unless `special_in_text` is False.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from data.tokenizers import chat_template

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
GENERATION = "generation_config.json"
MODEL = "config.json"
SENTENCEPIECE = "tokenizer.model"
# What belongs to a tokenizer, and is copied with it.
FILES = (
    *(TOKENIZER, CONFIG, SPECIAL_TOKENS, GENERATION, SENTENCEPIECE),
    *("added_tokens.json", "vocab.json", "merges.txt", chat_template.FILE, chat_template.FOLDER),
)


class TokenizerError(ValueError):
    """Files that are no tokenizer, or whose parts do not fit together."""


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as its files describe it.

    Attributes:
      path: their directory.
      content: tokenizer.json.
      tokens: names of special tokens, such as `bos_token` -> `<s>`.
      eos_ids: all ids that end a continuation.
      adds_bos: whether texts begin with BOS.
      chat_template: None where there is none.
    """

    path: str
    content: bytes
    tokens: Mapping[str, str]
    eos_ids: tuple[int, ...]
    adds_bos: bool
    chat_template: chat_template.ChatTemplate | None

    def id(self, name: str) -> int | None:
        """Id of a special token by its name, such as `bos_token`; None where there is none.

        Raises:
          TokenizerError: the tokenizer has no entry of the text that the name stands for.
        """
        if (text := self.tokens.get(name)) is None:
            return None
        found = load(self.content).token_to_id(text)
        if found is None:
            raise TokenizerError(
                f"{self.path}/{CONFIG}: {name} is {text!r}, which {TOKENIZER} does not have. Correct it, "
                "or take both files from the same checkpoint"
            )
        return found


def read(path: str | os.PathLike) -> TokenizerFiles:
    """Reads the tokenizer in a directory.

    Raises:
      FileNotFoundError: there is no tokenizer.json.
      TokenizerError: a file is damaged, or they do not fit together.
    """
    folder = pathlib.Path(path)
    try:
        content = (folder / TOKENIZER).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(_missing(folder)) from None
    try:
        tokenizer = load(content)
    except Exception as error:  # the library raises Exception itself
        raise TokenizerError(
            f"{folder / TOKENIZER} is damaged or no tokenizer: {error}. Copy it again from the checkpoint"
        ) from None
    config = _json(folder / CONFIG)
    tokens = _named_tokens(_json(folder / SPECIAL_TOKENS)) | _named_tokens(config)
    files = TokenizerFiles(
        path=os.fspath(folder),
        content=content,
        tokens=tokens,
        eos_ids=(),
        adds_bos=False,
        chat_template=chat_template.read(folder, config, tokens),
    )
    return dataclasses.replace(
        files,
        eos_ids=_eos_ids(folder, files.id("eos_token")),
        adds_bos=_adds_bos(tokenizer, config.get("add_bos_token"), files.id("bos_token")),
    )


@functools.lru_cache(maxsize=8)
def load(content: bytes, extra_ids: int = 0, special_in_text: bool = True) -> tokenizers.Tokenizer:
    """The tokenizer in a tokenizer.json, without what the file says of padding and truncation.

    Args:
      content: the file.
      extra_ids: sentinels `<extra_id_0>`, ... after its entries, the last of them first as for T5.
      special_in_text: whether special tokens that are spelled in a text are encoded as such.

    Raises:
      TokenizerError: it has such sentinels already.
    """
    tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = not special_in_text
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(extra_ids))]
    if any(tokenizer.token_to_id(sentinel) is not None for sentinel in sentinels):
        raise TokenizerError(f"the tokenizer has {sentinels[-1]} already: set extra_ids=0")
    size = num_ids(tokenizer)
    tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in sentinels])
    if num_ids(tokenizer) != size + extra_ids:
        raise TokenizerError("the tokenizer's ids have gaps, so that it takes no extra_ids")
    return tokenizer


def num_ids(tokenizer: tokenizers.Tokenizer) -> int:
    """Number of entries, which is one more than the largest id."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def _missing(folder: pathlib.Path) -> str:
    if not folder.is_dir():
        return f"no directory {os.fspath(folder)!r} with tokenizer files"
    if (folder / SENTENCEPIECE).is_file():
        return (
            f"{os.fspath(folder)!r} has no {TOKENIZER}, but a SentencePiece model: use "
            f"vocabularies.from_file(path='{folder / SENTENCEPIECE}')"
        )
    return (
        f"{os.fspath(folder)!r} has neither {TOKENIZER} nor {SENTENCEPIECE}: copy the tokenizer files of "
        "the checkpoint there"
    )


def _json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a file, empty where there is no file."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise TokenizerError(
            f"{path} is damaged: {error}. Copy it again from the checkpoint"
        ) from None
    if not isinstance(found, dict):
        raise TokenizerError(f"{path} holds no JSON object. Copy it again from the checkpoint")
    return found


def _named_tokens(values: Mapping[str, Any]) -> dict[str, str]:
    """The entries `..._token`, which are texts or objects with the text as `content`."""
    found = {}
    for name, value in values.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _eos_ids(folder: pathlib.Path, own: int | None) -> tuple[int, ...]:
    for name in (GENERATION, MODEL):
        value = _json(folder / name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not ids or not all(type(id) is int and id >= 0 for id in ids):
            raise TokenizerError(
                f"{folder / name}: eos_token_id is {value!r}, not an id or a list of ids"
            )
        return tuple(ids)
    return () if own is None else (own,)


def _adds_bos(tokenizer: tokenizers.Tokenizer, said: bool | None, bos_id: int | None) -> bool:
    """What tokenizer_config.json says, for loaders obey that; else what the post-processor does."""
    if bos_id is None:
        return False
    if said is not None:
        return bool(said)
    return _first(tokenizer.encode("a").ids) == bos_id


def _first(ids: Sequence[int]) -> int | None:
    return ids[0] if ids else None
