"""Embeds domains of data by their documents, so that a router can place experts of them (Nexus, 2408.15901).

Example, of domains that are generated (data/nexus/lag_domains.py), and one that is added later:

  python -m launch.prepare embed_domains --gin_file=t5x_configs/data/lag_domains.gin --output=/tmp/domains.json \\
    --domain general=task:lag_general --domain four=task:lag_4 --domain seven=task:lag_7
  python -m launch.prepare embed_domains --gin_file=t5x_configs/data/lag_domains.gin --extend=/tmp/domains.json \\
    --domain eleven=task:lag_11

and of files: --domain law='data/law/*.jsonl.zst'. A source is read whole, or as far as --limit goes, and documents are
drawn of it; of tasks it is the training split. A file that is extended keeps its encoder, its settings, its mean and its
old vectors, so that its encoder's flags are left out, or have to agree.
"""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launch import cli
from launch.inference import row_files

# Encoder -> its settings with their defaults; None for a setting without a default.
_DRAWN: dict[str, Any] = {"documents": 2000, "tokens": 512, "seed": 0}
ENCODERS: dict[str, dict[str, Any]] = {
    "ngrams": {"order": 2, "dim": 1024, **_DRAWN},
    "model": {"checkpoint": None, "params": "auto", **_DRAWN},
    "sentences": {"sentence_model": None, **_DRAWN},
    "random": {"dim": 1024, "seed": 0},
    "one_hot": {"dim": 1024},
}
CONTROLS = ("random", "one_hot")  # they read no documents
_HELP = """\
ngrams     how often the n-grams of characters occur, projected at random: --order --dim
model      mean final hidden states of a trained run: --checkpoint --params
sentences  a model of the package sentence-transformers: --sentence_model
random     a control, directions that say nothing: --dim
one_hot    a control, an axis for each domain: --dim
Of documents --documents and --tokens are read, drawn by --seed; controls read none, and take NAME alone."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return cli.main(
        __doc__,
        entry="launch.preparation.embed_domains:register",
        command="prepare embed_domains",
        extra_flags=_add_flags,
        run=_run,
        default_files=lambda flags: ["t5x_configs/runs/embed_domains.gin"],
        unused={"TASKS": "()"},
        part=True,
        argv=argv,
    )


def register(*, tasks: Sequence[Callable[[], Any]]) -> None:
    """Registers the SeqIO tasks of the gin configuration."""
    for call in tasks:
        call()


def _run(start: cli.Start) -> None:
    """Embeds domains with the settings of the flags.

    Raises:
      EmbeddingsError, DataError, FileNotFoundError, RowFileError, LoadError.
    """
    from data.nexus import domain_embeddings
    from data.nexus.domain_embeddings import EmbeddingsError
    from launch.preparation import domain_vectors

    flags = start.flags
    path = flags.output or flags.extend
    if not path:
        raise EmbeddingsError(
            "give --output=FILE for a new file, or --extend=FILE for one that is there"
        )
    row_files.check_output(path)
    before = domain_vectors.content(path)
    if flags.output and os.path.exists(path):
        raise EmbeddingsError(
            f"--output={path} is there already, and routers may have learned from it: --extend={path} adds "
            "domains to it; to make it anew, remove it first"
        )
    old = domain_embeddings.read(flags.extend) if flags.extend else None
    settings = _settings(flags, old.encoder if old else None)
    reads = settings["kind"] not in CONTROLS
    domain_vectors.embed(
        path,
        before,
        _sources(flags, needed=reads),
        settings,
        old=old,
        reads=reads,
        flags=flags,
        register_tasks=start,
    )


def _add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags in groups. Settings of encoders have no default here: an extended file has its own."""
    files = parser.add_argument_group("domains")
    files.add_argument("--output", metavar="FILE", help="a new file of embeddings, JSON")
    files.add_argument(
        "--extend",
        metavar="FILE",
        help="a file of embeddings to add domains to, in place or as another file with --output",
    )
    files.add_argument(
        "--domain",
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help="a domain and its documents, repeatable: a file or a pattern (JSON lines, text, Parquet; also "
        ".gz and .zst), or task:NAME for a SeqIO task that --gin_file registers",
    )
    files.add_argument(
        "--text_key", default="text", metavar="KEY", help="of texts in JSON and Parquet (text)"
    )
    files.add_argument(
        "--document_per",
        choices=("file", "paragraph", "line"),
        default="file",
        help="unit of documents in text files (default file)",
    )
    files.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="only the first N documents of each source are read, and drawn from (default all)",
    )
    encoder = parser.add_argument_group("encoder", f"Encoders, and their flags:\n{_HELP}")
    encoder.add_argument("--encoder", choices=tuple(ENCODERS), help="(default ngrams)")
    encoder.add_argument("--order", type=int, metavar="N", help="of n-grams (default 2)")
    encoder.add_argument("--dim", type=int, metavar="M", help="width of vectors (default 1024)")
    encoder.add_argument("--checkpoint", metavar="DIR", help="run or step directory")
    encoder.add_argument("--params", choices=("auto", "raw", "ema"), help="see launch.score")
    encoder.add_argument(
        "--sentence_model", metavar="DIR", help="a saved model; none is downloaded"
    )
    encoder.add_argument(
        "--documents", type=int, metavar="N", help="of each domain at most (default 2000)"
    )
    encoder.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="of each document, the first ones; of ngrams characters (default 512)",
    )
    encoder.add_argument(
        "--seed", type=int, metavar="N", help="of draws and projections (default 0)"
    )
    encoder.add_argument(
        "--batch_size", type=int, default=32, metavar="N", help="documents at a time (default 32)"
    )


def _sources(flags: argparse.Namespace, *, needed: bool) -> dict[str, str]:
    """Returns the sources by name; a source is '' if the encoder reads no documents.

    Raises:
      EmbeddingsError: a name without a source, a repeated name, or a limit that is invalid or not used.
    """
    from data.nexus.domain_embeddings import EmbeddingsError

    if flags.limit is not None and not needed:
        raise EmbeddingsError("--limit is of encoders that read documents: leave it out")
    if flags.limit is not None and flags.limit < 1:
        raise EmbeddingsError(f"--limit={flags.limit} must be at least 1")
    by_name: dict[str, str] = {}
    for text in flags.domain:
        name, _, source = text.partition("=")
        if not name or (needed and not source):
            raise EmbeddingsError(f"--domain={text}: expected NAME=SOURCE, such as law=law.jsonl")
        if name in by_name:
            raise EmbeddingsError(
                f"--domain={name} is given twice: give one pattern for all of its files"
            )
        by_name[name] = source if needed else ""
    return by_name


def _settings(flags: argparse.Namespace, frozen: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns kind and settings of the encoder, from the flags or from the file to extend.

    Raises:
      EmbeddingsError: a setting of another encoder, out of range, missing, or different from the file's.
    """
    from data.nexus.domain_embeddings import PLACES, EmbeddingsError

    kind = flags.encoder or (frozen["kind"] if frozen else "ngrams")
    names = dict.fromkeys(name for own in ENCODERS.values() for name in own)
    chosen = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    if wrong := [name for name in chosen if name not in ENCODERS[kind]]:
        raise EmbeddingsError(
            f"--{wrong[0]} is no setting of --encoder={kind}, which has "
            f"{', '.join(f'--{name}' for name in ENCODERS[kind])}: leave it out"
        )
    begun = frozen if frozen and frozen["kind"] == kind else {"kind": kind, **ENCODERS[kind]}
    settings = {**begun, **chosen}
    for name in PLACES:
        if name in settings and settings[name] is None:
            raise EmbeddingsError(f"--encoder={kind} needs --{name}=DIR")
    for name in ("order", "dim", "documents", "tokens"):
        if settings.get(name, 1) < 1:
            raise EmbeddingsError(f"--{name}={settings[name]} must be at least 1")
    if settings.get("seed", 0) < 0:
        raise EmbeddingsError(f"--seed={settings['seed']} must not be negative")
    return settings


if __name__ == "__main__":
    raise SystemExit(main())
