"""The rows about settings that would have no effect, and about texts on which a pattern could run for hours."""

import functools
import json
import pathlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tests.faults import calls
from tests.faults.hostile import checkpoint
from tests.faults.table import Bench, Case, Row, Silent, Unclear

# Flags that another flag, or its absence, would leave without effect, and what the error names.
_GENERATE: dict[str, tuple[str, ...]] = {
    "top_p": ("--top_p=0.5",),
    "top_k": ("--top_k=5",),
    "min_p": ("--min_p=0.1",),
    "num_samples": ("--num_samples=2",),
    "temperature": ("--num_beams=2", "--temperature=0.7"),
    "top_p of beams": ("--num_beams=2", "--top_p=0.5"),
    "length_penalty": ("--length_penalty=2",),
    "early_stopping": ("--early_stopping",),
    "capacity": ("--cache=capacity=16",),
    "compare": ("--compare",),
    "token_healing": ("--token_healing",),
}
_OF_ENCODER_DECODERS: dict[str, tuple[str, ...]] = {
    "cache_policy": ("--cache_policy=snapkv", "--cache=capacity=16", "--cache=window=4"),
    "cache_policy streaming_llm": ("--cache_policy=streaming_llm",),
    "cache_policy h2o": ("--cache_policy=h2o", "--cache=capacity=16"),
    "prefill_chunk": ("--prefill_chunk=4",),
    "token_healing": ("--token_healing",),
}
_CONVERT: dict[str, tuple[str, ...]] = {
    "family": ("--family=llama",),
    "shard_size": ("--shard_size=1MB",),
    "params": ("--params=ema",),
    "base": ("--base=x",),
}
_T5: dict[str, Any] = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "vocab_size": 16,
    "d_model": 8,
    "d_kv": 4,
    "d_ff": 12,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}


def _t5(folder: pathlib.Path) -> pathlib.Path:
    import safetensors.numpy

    from espalier.model.hf import registry

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_T5))
    family = registry.family_of_config(_T5)
    random_ = np.random.default_rng(0)
    shapes = family.shapes(family.model(_T5))
    tensors = {name: random_.normal(size=s).astype(np.float32) for name, s in shapes.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def _settings(seed: int) -> Iterator[Case]:
    del seed
    for name, flags in _GENERATE.items():
        yield Case(f"generate: {name}", functools.partial(_generate, checkpoint.write, name, flags))
    for name, flags in _OF_ENCODER_DECODERS.items():
        yield Case(f"an encoder-decoder: {name}", functools.partial(_generate, _t5, name, flags))
    for name, flags in _CONVERT.items():
        yield Case(f"convert --from_hf: {name}", functools.partial(_convert, name, flags))


def _generate(
    write: Callable[[pathlib.Path], pathlib.Path], name: str, flags: Sequence[str], bench: Bench
) -> None:
    rows = bench.folder / "in.jsonl"
    rows.write_text('{"tokens": [1, 2, 3]}\n')
    output = bench.folder / "out.jsonl"
    paths = [f"--checkpoint={write(bench.folder / 'hf')}", f"--inputs={rows}", f"--output={output}"]
    calls.refused("generate", [*paths, "--max_new_tokens=2", *flags], name.split()[0])
    if output.exists():
        raise Unclear("a refused command has left an output")


def _convert(name: str, flags: Sequence[str], bench: Bench) -> None:
    source = checkpoint.write(bench.folder / "hf")
    target = bench.folder / "run"
    calls.refused("convert", [f"--from_hf={source}", f"--to={target}", *flags], f"--{name}")


_N = 12_500
_TEXTS: dict[str, Callable[[int], str]] = {
    "one Chinese word": lambda n: "\u4e2d" * n,
    "one Latin word": lambda n: "a" * n,
    "addresses": lambda n: "a@" * (n // 2),
    "dots": lambda n: "." * n,
    "a and dots": lambda n: "a." * (n // 2),
    "slashes": lambda n: "/" * n,
    "brackets": lambda n: "[" * n,
    "braces": lambda n: "{{" * (n // 2),
    "quotes": lambda n: "'\"" * (n // 2),
    "back-quotes": lambda n: "`" * n,
    "spaces": lambda n: " " * n,
    "white space and a letter": lambda n: " " * (n - 1) + "x",
    "line breaks": lambda n: "\n" * n,
    "stars": lambda n: "*" * n,
    "dashes": lambda n: "-" * n,
    "digits": lambda n: "1" * n,
    "commas and digits": lambda n: "1," * (n // 2),
    "entities": lambda n: "&#" * (n // 2),
    "tags": lambda n: "<a" * (n // 2),
    "any of these": lambda n: "".join(random.Random(0).choices(".@/a1 \n<&[{'\"`*-:", k=n)),
}


def _readers() -> dict[str, Callable[[str], Any]]:
    """Returns functions of this project that search texts of others, such as replies, for patterns."""
    from espalier.common import spelling
    from espalier.data.languages import identify

    return {
        "lines to judge the language of": identify.judged_lines,
        "the language by scripts": lambda text: identify.check(text, "en", identify.ByScript()),
        "the nearest name": lambda text: spelling.nearest(text, ("snapkv", "full")),
    }


def _texts(seed: int) -> Iterator[Case]:
    del seed
    for name in _TEXTS:
        yield Case(f"{name}, {16 * _N:,} characters", functools.partial(_text, name), 120.0)


def _text(name: str, bench: Bench) -> int:
    """The time of 16 n characters is not near 256 times that of n."""
    del bench
    readers = _readers()
    for reader, read in readers.items():
        seconds = []
        for n in (_N, 16 * _N):
            text = _TEXTS[name](n)
            began = time.perf_counter()
            read(text)
            seconds.append(time.perf_counter() - began)
        if seconds[1] > max(1.0, 64 * seconds[0]):
            raise Silent(
                f"{reader}: {seconds[0]:.3f} s, and {seconds[1]:.1f} s for 16 times as much"
            )
    return len(readers)


ROWS = (
    Row(
        34,
        "settings that others, or the kind of model, would leave without effect",
        "one error that names the setting, status 2; nothing is written",
        _settings,
        sample=3,
    ),
    Row(
        35,
        "long texts of others on which a pattern takes quadratic time",
        "the time grows with the length, not with its square",
        _texts,
        sample=3,
    ),
)
