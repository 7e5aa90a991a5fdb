"""Random small T5 and mT5 models with the log-probabilities and greedy continuations of transformers.

The goldens beside this file (parity/t5_*.npz and mt5_*.npz, for tests/model/hf/t5_test.py) are made by

    .venv-peers/bin/python tests/model/hf/goldens/make_t5_parity.py

A case holds config.json and tensors, as make_parity.py writes them, inputs and targets of several lengths, the float32
log-probabilities of the targets' next tokens, and the tokens that greedy decoding adds to DECODER_START.
"""

import json
import pathlib

import numpy as np
import torch
import transformers
from transformers.models.t5.modeling_t5 import T5Attention

HERE = pathlib.Path(__file__).parent
NEW_TOKENS = 12
SIZES = {"vocab_size": 61, "d_model": 16, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_heads": 3}
CASES = {
    "t5_0": SIZES | {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "t5_1": SIZES
    | {"num_layers": 3, "num_decoder_layers": 2, "layer_norm_epsilon": 1e-5}
    | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "t5_2": SIZES
    | {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
    | {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False},
    "mt5_0": SIZES | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
# (inputs, targets); one row is longer than the largest distance of a bucket of its own.
LENGTHS = [(1, 1), (7, 5), (4, 9), (150, 140)]


def half(values: torch.Tensor) -> torch.Tensor:
    return values.half().float()


def randomise(model: torch.nn.Module, generator: torch.Generator, *, tied: bool) -> None:
    """Values that show every term, all of them float16 ones; a head of its own unless `tied`."""
    if not tied:  # transformers ties it at the start, and unties it where a file has both
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in name:
                noise = 1 + 0.3 * noise
            elif "lm_head" in name:
                noise = noise * 0.5
            elif "shared" not in name and "relative" not in name:
                noise = noise * value.shape[-1] ** -0.5
            value.copy_(half(noise))


def buckets(model: torch.nn.Module, stack: str) -> np.ndarray:
    """Buckets of key position minus query position from -200 to 200."""
    config = model.config
    return T5Attention._relative_position_bucket(
        torch.arange(-200, 201),
        bidirectional=stack == "encoder",
        num_buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
    ).numpy()


def make(name: str, seed: int) -> dict:
    family, given = name.partition("_")[0], CASES[name]
    config_class = {"t5": transformers.T5Config, "mt5": transformers.MT5Config}[family]
    model_class = {
        "t5": transformers.T5ForConditionalGeneration,
        "mt5": transformers.MT5ForConditionalGeneration,
    }[family]
    config = config_class(**given)
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    tied = given["tie_word_embeddings"]
    randomise(model, torch.Generator().manual_seed(seed), tied=tied)
    copies = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    copies += ["lm_head.weight"] * tied
    written = {
        "model_type": family,
        "architectures": [model_class.__name__],
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
        "torch_dtype": "float32",
        **given,
    }
    case = {"config": np.array(json.dumps(written))}
    for key, value in model.state_dict().items():
        if key not in copies:
            case[f"tensor/{key}"] = value.numpy().astype(np.float16)
            assert (case[f"tensor/{key}"] == value.numpy()).all(), key
    rng = np.random.default_rng(seed)
    for i, lengths in enumerate(LENGTHS):
        inputs, targets = (rng.integers(2, given["vocab_size"], n) for n in lengths)
        targets[0] = 0
        ids = torch.tensor(inputs)[None]
        with torch.no_grad():
            logits = model(input_ids=ids, decoder_input_ids=torch.tensor(targets)[None]).logits
            greedy = model.generate(
                input_ids=ids,
                decoder_start_token_id=0,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                num_beams=1,
            )
        case[f"inputs/{i}"], case[f"targets/{i}"] = (
            inputs.astype(np.int32),
            targets.astype(np.int32),
        )
        case[f"logprobs/{i}"] = torch.log_softmax(logits.float(), -1)[0].numpy()
        case[f"greedy/{i}"] = greedy[0, 1:].numpy().astype(np.int32)
    for stack in ("encoder", "decoder"):
        case[f"buckets/{stack}"] = buckets(model, stack).astype(np.int32)
    return case


def main() -> None:
    for seed, name in enumerate(CASES):
        case = make(name, seed)
        np.savez_compressed(HERE / "parity" / f"{name}.npz", **case)
        greedy = [case[f"greedy/{i}"].tolist() for i in range(len(LENGTHS))]
        print(name, json.loads(str(case["config"])), greedy)


if __name__ == "__main__":
    main()
