"""Embeds domains of data by their documents, so that a router can place experts of them (Nexus, 2408.15901).

Example, of domains that are generated (launch/papers/nexus/lag_domains.py), and one that is added later:

  espalier prepare embed_domains --gin_file=t5x_configs/data/lag_domains.gin --output=/tmp/domains.json \\
    --domain general=task:lag_general --domain four=task:lag_4 --domain seven=task:lag_7
  espalier prepare embed_domains --gin_file=t5x_configs/data/lag_domains.gin --extend=/tmp/domains.json \\
    --domain eleven=task:lag_11

and of files: --domain law='data/law/*.jsonl.zst'. Documents are drawn from the whole source, or from its first --limit
documents; of a task, from its training split. An extended file keeps its encoder, settings, mean, length and old vectors: omit
the flags of the encoder, or repeat the same values.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

from espalier.common.ranges import Size
from espalier.launch import cli
from espalier.launch.config import setting_flags

# Encoder -> its settings with their defaults; None for a setting without a default.
_DRAWN: dict[str, Any] = {"documents": 2000, "tokens": 512, "seed": 0}
ENCODERS: dict[str, dict[str, Any]] = {
    "ngrams": {"order": 2, "dim": 1024, **_DRAWN},
    "model": {"checkpoint": None, "params": "auto", **_DRAWN},
    "sentences": {"sentence_model": None, **_DRAWN},
    "random": {"dim": 1024, "seed": 0},
    "one_hot": {"dim": 1024},
}
_HELP = """\
ngrams     frequencies of n-grams of characters, projected at random: --order --dim
model      mean final hidden states of a trained run: --checkpoint --params
sentences  a model of the package sentence-transformers: --sentence_model
random     a control, random directions: --dim
one_hot    a control, an axis for each domain: --dim
Encoders read --documents and --tokens, drawn by --seed; controls read no documents and take NAME alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainFlags:
    """Domains and their documents.

    Attributes:
      output: write the embeddings to this JSON file.
      extend: a file of embeddings to add domains to, in place or as another file with --output.
      domain: NAME=SOURCE, a domain and its documents, repeatable: a file or a pattern (JSON lines, text, Parquet; also .gz
        and .zst), or task:NAME for a SeqIO task that --gin_file registers.
      text_key: key of texts in JSON and Parquet.
      document_per: unit of documents in text files.
      limit: number of first documents of each source to draw from; all if not set.
      batch_size: documents at a time in a model.
      mean: mean to subtract from the vectors of a new file: over its domains, or none (default: domains for encoders that read
        documents, none for controls). Centred vectors need a length of about three times the root of their width, or
        a router's projection begins with opposite domains as neighbours.
      length: length of the vectors of a new file (default 1).
    """

    output: str | None = None
    extend: str | None = None
    domain: Sequence[str] | None = None
    text_key: str = "text"
    document_per: Literal["file", "paragraph", "line"] = "file"
    limit: Size | None = None
    batch_size: int = 32
    mean: Literal["domains", "none"] | None = None
    length: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderFlags:
    """The encoder and its settings, with the defaults of ENCODERS or of the file to extend.

    Attributes:
      encoder: what embeds the texts of a domain (default ngrams).
      order: number of characters of an n-gram (default 2).
      dim: number of components of an embedding (default 1024).
      checkpoint: run or step directory.
      params: which parameters are used: raw, their moving average (ema), or the average where there is one (auto).
      sentence_model: directory of a saved model; none is downloaded.
      documents: maximum documents of each domain (default 2000).
      tokens: first tokens of each document to read; of ngrams, characters (default 512).
      seed: seed of draws and projections (default 0).
    """

    encoder: Literal["ngrams", "model", "sentences", "random", "one_hot"] | None = None
    order: int | None = None
    dim: int | None = None
    checkpoint: str | None = None
    params: Literal["auto", "raw", "ema"] | None = None
    sentence_model: str | None = None
    documents: int | None = None
    tokens: int | None = None
    seed: int | None = None


def _add_flags(parser: argparse.ArgumentParser) -> None:
    setting_flags.add(parser.add_argument_group("domains"), DomainFlags)
    encoder = parser.add_argument_group("encoder", f"Encoders, and their flags:\n{_HELP}")
    setting_flags.add(encoder, EncoderFlags)


def register(*, tasks: Sequence[Callable[[], Any]]) -> None:
    """Registers the SeqIO tasks of the gin configuration."""
    for call in tasks:
        call()


def _run(start: cli.Start) -> None:
    from espalier.launch.nexus import domain_vectors

    flags = DomainFlags(**setting_flags.given(start.flags, DomainFlags))
    encoder = setting_flags.given(start.flags, EncoderFlags)
    kind = encoder.pop("encoder", None)
    domain_vectors.embed(flags, kind, encoder, encoders=ENCODERS, register_tasks=start)


main = cli.gin_command(
    __doc__,
    "espalier.launch.nexus.embed_domains:register",
    command="prepare embed_domains",
    extra_flags=_add_flags,
    run=_run,
    default_files=lambda flags: ["t5x_configs/runs/embed_domains.gin"],
    unused={"TASKS": "()"},
    part=True,
)

if __name__ == "__main__":
    raise SystemExit(main())
