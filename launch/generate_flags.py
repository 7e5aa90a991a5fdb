"""Flags of `launch.generate`, and what they mean together."""

import argparse
import math
from collections.abc import Sequence
from typing import Any

# As model/kv_cache/policies.py has them, without importing JAX to print a help text.
CACHE_POLICIES = """\
full           everything
sliding        the last tokens: window=4096
streaming_llm  the first and the last: capacity=1024 sinks=4 renumber=True
snapkv         what the prompt's end attends to:
               capacity=1024 window=32 kernel=7 pooling=max group_vote=mean
pyramidkv      snapkv, more in shallow layers: those of snapkv, beta=20.0
adakv          snapkv, shared among heads: those of snapkv, safeguard=0.2
h2o            what all of the prompt attends to: capacity=1024 window=None group_vote=mean
tova           what the last token attends to: capacity=1024
random         a control: capacity=1024 window=32 seed=0"""

_EARLY = {"true": True, "false": False, "never": "never"}


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the flags in groups, after those of files of rows."""
    from launch.run import load_run

    load_run.add_row_flags(parser, required=False)
    _add_output(parser.add_argument_group("what is generated"))
    _add_sampling(parser.add_argument_group("sampling"))
    _add_beams(parser.add_argument_group("beam search"))
    policies = f"Policies, what they keep, and their settings by default:\n{CACHE_POLICIES}"
    _add_cache(parser.add_argument_group("key/value cache", policies))


def _add_output(group: Any) -> None:
    group.add_argument("--prompt", metavar="TEXT", help="one text, continued on standard output")
    group.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print the continuation of --prompt as it is generated (default on a terminal)",
    )
    group.add_argument(
        "--max_new_tokens", type=int, default=128, metavar="N", help="at most so many (default 128)"
    )
    group.add_argument(
        "--num_samples",
        type=int,
        default=1,
        metavar="N",
        help="continuations of each prompt: draws, or the N best of --num_beams (default 1)",
    )
    group.add_argument(
        "--eos_id",
        type=int,
        action="append",
        metavar="ID",
        help="a token that ends a continuation, in place of the vocabulary's; repeatable; -1 for none",
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; repeatable. The tokens that make it stay in 'tokens'",
    )


def _add_sampling(group: Any) -> None:
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="0 (default) takes the most probable token each time",
    )
    group.add_argument(
        "--top_k", type=int, metavar="K", help="draw among the K most probable tokens"
    )
    group.add_argument(
        "--top_p",
        type=float,
        metavar="P",
        help="draw among the fewest most probable tokens that have probability P together",
    )
    group.add_argument(
        "--min_p",
        type=float,
        metavar="P",
        help="draw among tokens at least P times as probable as the most probable one",
    )
    group.add_argument(
        "--repetition_penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1, tokens of the prompt and of what was generated become less probable, greedy "
        "choices and beams included (default 1)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N")


def _add_beams(group: Any) -> None:
    group.add_argument(
        "--num_beams", type=int, metavar="N", help="search with N beams in place of sampling"
    )
    group.add_argument(
        "--length_penalty",
        type=float,
        metavar="X",
        help="scores of finished beams are divided by length^X (default 1)",
    )
    group.add_argument(
        "--early_stopping",
        choices=tuple(_EARLY),
        help="end when N beams are finished (true), when the others look worse (false, default), or "
        "when they cannot become better (never)",
    )


def _add_cache(group: Any) -> None:
    group.add_argument(
        "--cache_policy",
        default="full",
        metavar="NAME",
        help="what is kept of the prompt's keys and values: a policy of those above (default full)",
    )
    group.add_argument(
        "--cache",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the policy, such as capacity=1024; repeatable",
    )
    group.add_argument(
        "--cache_dtype",
        choices=("int8", "bfloat16", "float16", "float32"),
        help="in which keys and values are kept (default: the model's)",
    )
    group.add_argument(
        "--prefill_chunk",
        type=int,
        metavar="N",
        help="read N tokens of the prompts at a time, for those too long to be read at once",
    )


def options(flags: argparse.Namespace) -> dict[str, Any]:
    """Arguments of generate.generate.

    Raises:
      LoadError, ValueError: flags that do not go together, or values out of range.
    """
    from launch.run.load_run import LoadError
    from model.kv_cache.policies import policy_from_text
    from trainers.decoding.beam import Beams
    from trainers.decoding.decode import Settings
    from trainers.decoding.sampling import Sampling

    _check(flags, LoadError)
    beams = None
    if flags.num_beams is not None:
        penalty = 1.0 if flags.length_penalty is None else flags.length_penalty
        beams = Beams(
            num_beams=flags.num_beams,
            length_penalty=penalty,
            early_stopping=_EARLY[flags.early_stopping or "false"],
        )
    settings = Settings(
        max_new_tokens=flags.max_new_tokens,
        num_samples=flags.num_samples,
        beams=beams,
        sampling=Sampling(
            temperature=flags.temperature,
            top_k=flags.top_k,
            top_p=flags.top_p,
            min_p=flags.min_p,
            repetition_penalty=flags.repetition_penalty,
        ),
    )
    policy = policy_from_text(flags.cache_policy, _pairs(flags.cache, LoadError))
    if policy.future:
        raise LoadError(
            f"--cache_policy={flags.cache_policy} reads the answer that it is to generate: it is for "
            "experiments. Choose another."
        )
    return {
        "checkpoint": flags.checkpoint,
        "params": flags.params,
        "settings": settings,
        "eos_ids": None if flags.eos_id is None else tuple(id for id in flags.eos_id if id >= 0),
        "stops": tuple(flags.stop),
        "seed": flags.seed,
        "policy": policy,
        "policy_name": " ".join([flags.cache_policy, *flags.cache]),
        "cache_dtype": flags.cache_dtype,
        "prefill_chunk": flags.prefill_chunk,
        "batch_size": flags.batch_size,
    }


def _check(flags: argparse.Namespace, error: type[Exception]) -> None:
    files = (flags.inputs, flags.output)
    if (flags.prompt is None) == (files == (None, None)) or (None in files) != (
        files == (None,) * 2
    ):
        raise error("Give either --prompt=TEXT, or --inputs=FILE and --output=FILE.")
    several = flags.num_samples > 1 or flags.num_beams is not None
    if flags.stream and (flags.prompt is None or several):
        raise error(
            "--stream shows one continuation of --prompt as it grows: leave out --inputs, --num_samples "
            "and --num_beams, or --stream."
        )
    if flags.num_beams is None:
        for name in ("length_penalty", "early_stopping"):
            if getattr(flags, name) is not None:
                raise error(f"--{name} is of beam search: give --num_beams=N, or leave it out.")
    elif flags.stop:
        raise error("--stop ends a text as it grows, which beams do not: leave out --num_beams.")
    if flags.length_penalty is not None and not math.isfinite(flags.length_penalty):
        raise error(f"--length_penalty={flags.length_penalty} must be finite.")
    if "" in flags.stop:
        raise error("--stop='' would end every text at once: give a text.")
    if flags.eos_id is not None and -1 in flags.eos_id and len(flags.eos_id) > 1:
        raise error("--eos_id=-1 is for none, and others are given: leave it out, or the others.")
    if flags.eos_id is not None and min(flags.eos_id) < -1:
        raise error(f"--eos_id={min(flags.eos_id)} is no token: give an id, or -1 for none.")
    if flags.prefill_chunk is not None and flags.prefill_chunk < 1:
        raise error(f"--prefill_chunk={flags.prefill_chunk} must be at least 1.")


def _pairs(texts: Sequence[str], error: type[Exception]) -> dict[str, str]:
    """NAME=VALUE texts as a mapping."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise error(f"--cache={text}: expected NAME=VALUE, such as --cache=capacity=1024.")
        if name in found:
            raise error(f"--cache={name} is given twice.")
        found[name] = value
    return found
