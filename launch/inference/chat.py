"""A conversation with a run's model: each line of the user is answered in the light of all lines before."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from espalier.common import stages
from espalier.launch.inference.generate import Decoding, decoder_and_texts, prompt_of, to_terminal
from espalier.launch.run import side_by_side
from espalier.launch.run.load_run import LoadError, RunConfig

NEW = "/new"  # begins another conversation


def converse(
    config: RunConfig,
    lines: Iterable[str],
    *,
    checkpoint: str,
    params: str = "auto",
    adapter: Sequence[str] = (),
    seed: int = 0,
    token_healing: bool = False,
    compare: bool = False,
    **options: Any,
) -> list[dict[str, str]]:
    """Answers lines one by one and shows the answers while they are generated; returns the last conversation.

    The first answer of each length of conversation takes longer, since its program is compiled.
    `launch.inference.generate.generate` describes the options.

    Raises:
      LoadError: there is no chat template, or there are several processes, which cannot share a terminal.
    """
    # For texts without a template; the command refuses a comparison.
    del token_healing, compare
    if jax.process_count() > 1:
        raise LoadError("--chat without --prompt or --inputs needs a single process.")
    messages: list[dict[str, str]] = []
    with side_by_side.load(config, checkpoint, adapter[:1], params=params) as ((_, loaded),):
        assert loaded.chat_template is not None  # raises LoadError now, not after the first line
        decoder, texts = decoder_and_texts(loaded, Decoding(**options), rows=1, show=to_terminal)
        for turn, line in enumerate(lines):
            if line.strip() == NEW:
                messages.clear()
                continue
            messages.append({"role": "user", "content": line})
            row = {"messages": messages}
            prompt = prompt_of(loaded, row, "--chat")
            (new,) = decoder.stream([prompt], seed=seed % 2**32, indices=[turn])
            messages.append({"role": "assistant", "content": texts.answer(row, 0, 0, new)["text"]})
            to_terminal("\n")
    return messages


def typed() -> Iterator[str]:
    """Yields the lines of standard input that are not blank, with a prompt on a terminal, up to its end."""
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        import readline  # noqa: F401  # line editing

        print(f"{NEW} begins another conversation; Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            with stages.quiet():
                line = input("> " if on_terminal else "")
        except EOFError:
            return
        if line.strip():
            yield line
