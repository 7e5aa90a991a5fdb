"""The row about configs of Hugging Face that lie."""

import functools
import json
from collections.abc import Iterator
from typing import Any

from tests.faults.hostile import checkpoint
from tests.faults.table import Bench, Case, Row

_LIES: tuple[dict[str, Any], ...] = (
    *({"num_attention_heads": x} for x in (4, 3, 0, -1, "2", 2.5, [2], 10**30)),
    *({"num_key_value_heads": x} for x in (2, 3, 0, -1, "1", True)),
    *({"vocab_size": x} for x in (10, 12, 0, -1, 10**12, "11")),
    *({"hidden_size": x} for x in (4, 16, 0, 7, 10**9, None)),
    *({"intermediate_size": x} for x in (11, 13, 0, None, "12")),
    *({"num_hidden_layers": x} for x in (1, 3, 0, -2, 10**9, None)),
    *({"head_dim": x} for x in (8, 0, -4, "4")),
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": "false"},
    *({"rope_theta": x} for x in (0, -1.0, "big", None, float("nan"))),
    *({"rms_norm_eps": x} for x in (0, -1.0, "small", float("inf"))),
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "linear"}},
    {"rope_scaling": "linear"},
    {"hidden_act": "no_such"},
    {"hidden_act": 3},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"sliding_window": 4, "model_type": "mistral", "architectures": ["LlamaForCausalLM"]},
    {"model_type": "t5"},
    {"model_type": None, "architectures": None},
    {"model_type": ["llama"]},
    {"architectures": "LlamaForCausalLM", "model_type": 3},
    {"quantization_config": {"quant_method": "gptq"}},
)


def _lies(seed: int) -> Iterator[Case]:
    del seed
    for number, changes in enumerate(_LIES):
        yield Case(f"{number}: {json.dumps(changes)}", functools.partial(_lie, changes))


def _lie(changes: dict[str, Any], bench: Bench) -> None:
    checkpoint.check_refused(bench, checkpoint.write(bench.folder / "hf", **changes))


ROWS = (Row(14, "Hugging Face configs that lie", "refused, nothing is left", _lies, sample=4),)
