"""Trains and stores the vocabulary of a data file, and prints its bytes per token on held-out text of each task.

Example: the corpus of installed packages, half a minute; a run with the same data file reuses the
vocabulary:

  espalier prepare vocabulary --gin_file=t5x_configs/data/corpus.gin --gin.VOCAB_SIZE=4096

The gin files and bindings of a training command work unchanged.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from espalier.data import tasks as registered
from espalier.launch import cli
from espalier.launch.prepare import workers

SHOWN_BYTES = 300_000  # bytes of each task for measuring bytes per token


def make_vocabulary(*, vocabulary: Any, tasks: Sequence[Callable[[], Any]]) -> dict[str, float]:
    """Prints and returns the bytes per token of a vocabulary on the held-out text of each task.

    Args:
      vocabulary: a vocabulary, such as from `data.tokenizers.vocabularies`; gin trains it.
      tasks: functions that register the tasks.
    """
    for register in tasks:
        register()
    print(f"{vocabulary}\n{vocabulary.vocab_size} ids\n")
    print(f"held-out text of each task, up to {SHOWN_BYTES // 1000} kB:")
    print(f"{'task':14s} {'kB':>6s} {'tokens':>8s} {'bytes/token':>11s}")
    rates = {}
    for name, source in registered.sources().items():
        if not registered.find(name).tokenises:
            print(f"{name:14s} its texts are parts of rows, and not measured")
            continue
        size, tokens = _count(source, vocabulary)
        rates[name] = size / max(tokens, 1)
        print(f"{name:14s} {size / 1e3:6.0f} {tokens:8d} {rates[name]:11.2f}")
    return rates


def _count(source: Any, vocabulary: Any) -> tuple[int, int]:
    """Returns the bytes and tokens of the first documents of the held-out split, or of the only split."""
    split = "validation" if "validation" in source.splits else source.splits[0]
    size = tokens = 0
    for example in chain.from_iterable(
        source.read_examples(piece, split) for piece in source.pieces(split)
    ):
        size += len(example["text"].encode())
        tokens += len(vocabulary.encode(example["text"]))
        if size >= SHOWN_BYTES:
            break
    return size, tokens


main = cli.gin_command(
    __doc__,
    "espalier.launch.prepare.vocabulary:make_vocabulary",
    command="prepare vocabulary",
    extra_flags=workers.add_flags,
    run=workers.used(lambda start: start()),
    default_files=lambda flags: ["t5x_configs/runs/vocabulary.gin"],
    part=True,
)

if __name__ == "__main__":
    raise SystemExit(main())
