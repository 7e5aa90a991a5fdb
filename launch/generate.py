"""Continues texts with a trained model: greedily, sampled, or by beam search.

Example, after a run in /tmp/espalier_tiny (see espalier train --help):

  espalier generate --checkpoint=/tmp/espalier_tiny --prompt='def main(' --temperature=0.7

--chat renders a --prompt, or the texts of --inputs, with the model's chat template; alone, it begins a
conversation on the terminal.

--inputs=x.jsonl has rows {"text": "..."}, {"messages": [...]}, {"tokens": [...]} or {"prompt": ...}
(a text or messages, as in files of prompts and of preference pairs). --output=y.jsonl has --num_samples
rows for each of them, in the same order:

  prompt    the text or tokens that are continued
  text      the continuation, without EOS and --stop; absent if the run has no VOCABULARY
  tokens    the tokens of the continuation, with EOS and --stop
  logprobs  natural logarithms of the tokens' probabilities at temperature 1
  ended     "eos", "stop" or "length"
  sample    number of the sample, from 0
  score     score of the beam, with --num_beams
  adapter   name of the adapter, with --adapter: all rows of one adapter, then all of the next

Without VOCABULARY a run continues only tokens, and --eos_id sets the tokens that end a continuation.
Finished rows are in y.jsonl.partial until all are finished. A continuation depends on --seed and the index
of its row, not on other rows.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

from espalier.common import stages
from espalier.common.ranges import Size
from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.load import load_run
from espalier.launch.load.load_run import LoadError
from espalier.trainers.decoding.settings import Beams, Sampling, Settings

# The policies of model/kv_cache/policies.py, copied because importing them would load JAX for a help text.
CACHE_POLICIES = """\
full           everything
sliding        the last tokens: window=4096
streaming_llm  the first and the last: capacity=1024 sinks=4 renumber=True
snapkv         what the prompt's end attends to:
               capacity=1024 window=32 kernel=7 pooling=max group_vote=mean
pyramidkv      snapkv, more in shallow layers: the settings of snapkv, beta=20.0
adakv          snapkv, shared among heads: the settings of snapkv, safeguard=0.2
h2o            what all of the prompt attends to:
               capacity=1024 window=None kernel=1 pooling=max group_vote=mean
tova           what the last token attends to: capacity=1024 kernel=1 pooling=max
random         a control: capacity=1024 window=32 seed=0"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateFlags:
    """What is continued, and how.

    Attributes:
      prompt: continue this text, on standard output.
      chat: texts are messages of the user, rendered with the model's chat template; without --prompt and --inputs: a
        conversation on the terminal.
      stream: print the continuation of --prompt as it is generated (default on a terminal).
      eos_id: a token that ends a continuation, instead of the vocabulary's; repeatable; -1 for none.
      stop: end before this text; repeatable. Its tokens stay in 'tokens'.
      token_healing: draw the last token of a text again among the tokens that begin with its text, so that a text that ends
        within a word is completed; it is the first of the new tokens (default for --prompt).
      seed: random seed of sampling.
      cache_policy: the policy that selects which keys and values of the prompt stay cached; or policies by layer, each with
        its settings, such as '2*full; snapkv capacity=512', a list that is repeated over the layers.
      cache: a setting of a single policy, such as capacity=1024; repeatable.
      compare: continue with the full cache too, and report how many continuations are equal and the costs of both; rows of
        --output get "full" and "same_tokens", the number of tokens before the first difference.
      cache_dtype: type of cached keys and values (default: the model's).
      prefill_chunk: read N tokens of the prompts at a time, for prompts that are too long to be read at once.
    """

    prompt: str | None = None
    chat: bool = False
    stream: bool | None = None
    eos_id: Sequence[int] | None = None
    stop: Sequence[str] = ()
    token_healing: bool | None = None
    seed: int = 0
    cache_policy: setting_flags.Name = "full"
    cache: Sequence[Annotated[str, "NAME=VALUE"]] = ()
    compare: bool = False
    cache_dtype: load_run.CacheDtype | None = None
    prefill_chunk: Size | None = None


_NEW_CHAT = "/new"  # begins another conversation
_SIZES = ("max_new_tokens", "num_samples")
_ROWS = 8  # of a batch
_EARLY = {"true": True, "false": False, "never": "never"}


def run(start: cli.Start) -> None:
    """Generates with the settings of the flags; raises LoadError if they exclude each other."""
    flags = setting_flags.filled(start.flags, GenerateFlags)
    options = options_of(flags)
    from espalier.launch.inference import generate

    if flags.prompt is not None:
        stream = flags.stream
        generate.print_continuations(
            start(), flags.prompt, stream=stream, chat=flags.chat, **options
        )
    elif flags.inputs is not None:
        files = {"inputs": flags.inputs, "output": flags.output}
        generate.generate_file(start(), **files, chat=flags.chat, **options)
    else:
        converse(start(), _typed(), **options)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    load_run.add_row_flags(parser, required=False)
    parser.set_defaults(batch_size=None)  # of --inputs alone
    group = parser.add_argument_group("output")
    setting_flags.add(group, GenerateFlags, names=("prompt", "chat", "stream"))
    setting_flags.add(group, Settings, names=_SIZES)
    setting_flags.add(group, GenerateFlags, names=("eos_id", "stop"))
    group = parser.add_argument_group("sampling")
    setting_flags.add(group, Settings().sampling)
    setting_flags.add(group, GenerateFlags, names=("token_healing", "seed"))
    group = parser.add_argument_group("beam search")
    setting_flags.add(group, Beams, names=("num_beams", "length_penalty"), optional=True)
    group.add_argument(
        "--early_stopping",
        choices=tuple(_EARLY),
        default=argparse.SUPPRESS,
        help="end when N beams are finished (true), when the others look worse (false, default), or "
        "when they cannot become better (never)",
    )
    policies = f"Policies, the tokens they keep, and their settings by default:\n{CACHE_POLICIES}"
    group = parser.add_argument_group("key/value cache", policies)
    names = ("cache_policy", "cache", "compare", "cache_dtype", "prefill_chunk")
    setting_flags.add(group, GenerateFlags, names=names)


def options_of(flags: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments for launch/inference/generate.py.

    Raises:
      LoadError, ValueError: flags that exclude each other, or values out of range.
    """
    from espalier.model.kv_cache.policies import policy_from_text, settings_of

    _check(flags)
    beams = setting_flags.given(flags, Beams)
    if "early_stopping" in beams:
        beams["early_stopping"] = _EARLY[beams["early_stopping"]]
    settings = Settings(
        **setting_flags.given(flags, Settings, names=_SIZES),
        beams=Beams(**beams) if beams else None,
        sampling=dataclasses.replace(Settings().sampling, **setting_flags.given(flags, Sampling)),
    )
    policy = policy_from_text(flags.cache_policy, settings_of(flags.cache))
    if policy.future:
        raise LoadError(
            f"--cache_policy={flags.cache_policy} reads the answer that it should generate: it is only for "
            "experiments. Choose another."
        )
    same = ("checkpoint", "params", "adapter", "seed", "cache_dtype", "prefill_chunk", "compare")
    return {
        **{name: getattr(flags, name) for name in same},
        "batch_size": _ROWS if flags.batch_size is None else flags.batch_size,
        "settings": settings,
        "eos_ids": None if flags.eos_id is None else tuple(id for id in flags.eos_id if id >= 0),
        "stops": tuple(flags.stop),
        "policy": policy,
        "policy_name": " ".join([flags.cache_policy, *flags.cache]),
        # The tokens of a file are those after its prompts, as `score` reads them.
        "token_healing": False
        if flags.token_healing is None and flags.prompt is None
        else flags.token_healing,
    }


def _check(flags: argparse.Namespace) -> None:
    files = [flags.inputs is not None, flags.output is not None]
    session = flags.chat and flags.prompt is None and not any(files)
    if any(files) != all(files) or (any(files) == (flags.prompt is not None) and not session):
        raise LoadError(
            "Give either --prompt=TEXT, or --inputs=FILE and --output=FILE, or --chat for a conversation."
        )
    beams = setting_flags.given(flags, Beams)
    several = getattr(flags, "num_samples", 1) > 1 or beams
    if session and several:
        raise LoadError("--chat has one answer to each line: remove --num_samples and --num_beams.")
    if session and len(flags.adapter) > 1:
        raise LoadError("--chat is a conversation with one model: give one --adapter.")
    several = several or len(flags.adapter) > 1
    if flags.stream and not session and (flags.prompt is None or several):
        raise LoadError(
            "--stream shows one continuation of --prompt as it grows: remove --inputs, --num_samples, "
            "--num_beams and all --adapter but one, or --stream."
        )
    if flags.batch_size is not None and not any(files):
        raise LoadError(
            "--batch_size is of rows of --inputs, and there is one row at a time: remove it."
        )
    if flags.token_healing and flags.chat:
        raise LoadError(
            "--token_healing is of texts that are continued, which --chat does not: remove one of them."
        )
    if beams and "num_beams" not in beams:
        raise LoadError(
            f"--{next(iter(beams))} is only for beam search: give --num_beams=N, or remove it."
        )
    if beams and flags.stop:
        raise LoadError("--stop ends a text as it grows, which beams do not: remove --num_beams.")
    if not math.isfinite(beams.get("length_penalty", 0.0)):
        raise LoadError(f"--length_penalty={beams['length_penalty']} must be finite.")
    if "" in flags.stop:
        raise LoadError("--stop='' would end every text at once: give a text.")
    if flags.eos_id is not None and -1 in flags.eos_id and len(flags.eos_id) > 1:
        raise LoadError("--eos_id=-1 means no token, but there are other ids: remove it, or them.")
    if flags.eos_id is not None and min(flags.eos_id) < -1:
        raise LoadError(f"--eos_id={min(flags.eos_id)} is not a token: give an id, or -1 for none.")
    if flags.compare and session:
        raise LoadError("--compare is for --prompt and --inputs: remove it from a conversation.")
    if flags.compare and flags.cache_policy == "full" and flags.cache_dtype is None:
        raise LoadError(
            "--compare needs another cache than the full one: give --cache_policy=NAME."
        )


def converse(
    config: load_run.RunConfig,
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
    import jax

    from espalier.launch.inference import generate
    from espalier.launch.load import side_by_side

    # For texts without a template; the command refuses a comparison.
    del token_healing, compare
    if jax.process_count() > 1:
        raise LoadError("--chat without --prompt or --inputs needs a single process.")
    messages: list[dict[str, str]] = []
    with side_by_side.load(config, checkpoint, adapter[:1], params=params) as ((_, loaded),):
        assert loaded.chat_template is not None  # raises LoadError now, not after the first line
        decoding = generate.Decoding(**options)
        decoder, texts = generate.decoder_and_texts(
            loaded, decoding, rows=1, show=generate.to_terminal
        )
        for turn, line in enumerate(lines):
            if line.strip() == _NEW_CHAT:
                messages.clear()
                continue
            messages.append({"role": "user", "content": line})
            row = {"messages": messages}
            prompt = generate.prompt_of(loaded, row, "--chat")
            (new,) = decoder.stream([prompt], seed=seed % 2**32, indices=[turn])
            messages.append({"role": "assistant", "content": texts.answer(row, 0, 0, new)["text"]})
            generate.to_terminal("\n")
    return messages


def _typed() -> Iterator[str]:
    """Yields the lines of standard input that are not blank, with a prompt on a terminal, up to its end."""
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        import readline  # noqa: F401  # line editing

        print(f"{_NEW_CHAT} begins another conversation; Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            with stages.quiet():
                line = input("> " if on_terminal else "")
        except EOFError:
            return
        if line.strip():
            yield line


main = load_run.command(__doc__, "generate", run, add_flags)

if __name__ == "__main__":
    raise SystemExit(main())
