"""Random small models of every family with the log-probabilities that transformers gives them.

The goldens beside this file (parity/*.npz, for tests/model/hf/parity_test.py) are made by

    .venv-peers/bin/python tests/model/hf/goldens/make_parity.py

Other random models, compared at once:

    .venv-peers/bin/python tests/model/hf/goldens/make_parity.py --out /tmp/parity --seed 7 --count 3
    PARITY_CASES=/tmp/parity .venv/bin/python -m pytest -q tests/model/hf/parity_test.py

A case holds config.json and tensors as `save_pretrained` writes them (all values are float16 ones, so
that files are small and exact), documents of several lengths, and the float32 log-probabilities of each
document by itself; `shifted` are those of the last document at positions from `offset` on.
"""

import argparse
import json
import pathlib
import tempfile

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

HERE = pathlib.Path(__file__).parent
# A family's place in the list is a part of its seeds, so further ones come last.
FAMILIES = (
    *("cohere", "cohere2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "mixtral", "gpt2"),
    *("olmo2", "olmo3", "smollm3", "gpt_neox", "apertus", "gemma3_text", "qwen3_moe"),
    "cohere2_moe",
)


def two_ropes(full: dict, sliding: dict) -> dict:
    """Rotations of layers without and with a window."""
    return {
        "full_attention": {"rope_theta": 2e4, "rope_type": "default", **full},
        "sliding_attention": {"rope_theta": 1e3, "rope_type": "default", **sliding},
    }


# What a case must have, beyond what its seed draws; every feature of a family is in one of them.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 64
LINEAR = {"rope_type": "linear", "factor": 3.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SMALL = {"vocab_size": 67, "hidden_size": 24, "intermediate_size": 20}
MIXED = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
COHERE_MOE = {
    "num_hidden_layers": 3,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "logit_scale": 0.5,
}
COHERE_MOE |= {"prefix_dense_intermediate_size": 14, "sliding_window": 4, "attention_bias": False}
NEOX = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 2}
NEOX |= {"num_attention_heads": 2, "hidden_act": "gelu", "attention_bias": True}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
ODD = {"hidden_size": 24, "num_attention_heads": 3, "head_dim": 8, "intermediate_size": 37}
ODD["vocab_size"] = 101
FIXED = [
    ("cohere", 0, {**ODD, "num_key_value_heads": 3, "use_qk_norm": False}),
    ("cohere", 1, {"use_qk_norm": True}),
    ("cohere", 2, {"use_qk_norm": True, "attention_bias": True, "tie_word_embeddings": False}),
    ("cohere2", 0, {"num_hidden_layers": 4}),
    ("cohere2", 1, {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}),
    ("cohere2", 2, {"num_hidden_layers": 5, "attention_bias": True}),
    ("llama", 0, {**ODD, "num_key_value_heads": 1, "rope_parameters": LLAMA3}),
    ("llama", 1, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", 2, {"rope_parameters": {"rope_type": "linear", "factor": 3.0}}),
    ("mistral", 0, {**ODD, "num_key_value_heads": 3, "sliding_window": 4}),
    ("mistral", 1, {"sliding_window": None}),
    ("qwen2", 0, {"use_sliding_window": False}),
    ("qwen2", 1, {"use_sliding_window": True, "num_hidden_layers": 3, "max_window_layers": 1}),
    ("qwen3", 0, {**ODD, "head_dim": 10, "num_key_value_heads": 1, "use_sliding_window": False}),
    ("qwen3", 1, {"use_sliding_window": True, "num_hidden_layers": 2, "max_window_layers": 1}),
    ("gemma2", 0, {"num_hidden_layers": 4}),
    ("gemma2", 1, {"num_hidden_layers": 3, "query_pre_attn_scalar": 7, "attention_bias": True}),
    ("mixtral", 0, {"num_local_experts": 5, "num_experts_per_tok": 2}),
    ("mixtral", 1, {"sliding_window": 5, "num_local_experts": 3, "num_experts_per_tok": 3}),
    ("gpt2", 0, {}),
    ("gpt2", 1, {"n_inner": 37, "tie_word_embeddings": False, "scale_attn_weights": False}),
    ("olmo2", 0, {**SMALL, "num_hidden_layers": 2}),
    (
        "olmo2",
        1,
        {**SMALL, "num_hidden_layers": 2, "attention_bias": True, "rope_parameters": YARN},
    ),
    ("olmo3", 0, {**SMALL, "num_hidden_layers": 4}),
    ("olmo3", 1, {**SMALL, **MIXED, "rope_parameters": two_ropes(YARN, {})}),
    ("smollm3", 0, {**SMALL, "num_hidden_layers": 4}),
    ("smollm3", 1, {**SMALL, "num_hidden_layers": 3, "no_rope_layers": [1, 0, 0]}),
    ("gpt_neox", 0, {**NEOX, "rotary_pct": 0.25, "use_parallel_residual": True}),
    ("gpt_neox", 1, {**NEOX, "rotary_pct": 0.5, "use_parallel_residual": False}),
    ("apertus", 0, {**SMALL, "num_hidden_layers": 2}),
    ("gemma3_text", 0, {**SMALL, "num_hidden_layers": 6}),
    ("gemma3_text", 1, {**SMALL, **MIXED, "rope_parameters": two_ropes(LINEAR, {})}),
    ("qwen3_moe", 0, {**SMALL, **EXPERTS, "num_hidden_layers": 2, "norm_topk_prob": True}),
    ("qwen3_moe", 1, {**SMALL, **EXPERTS, "num_hidden_layers": 3, "mlp_only_layers": [0]}),
    ("qwen3_moe", 2, {**SMALL, **EXPERTS, "num_hidden_layers": 4, "decoder_sparse_step": 2}),
    (
        *("cohere2_moe", 0),  # older fields; a prefix whose full layers are rotated
        {
            **{**SMALL, **COHERE_MOE, "first_k_dense_replace": 1, "num_hidden_layers": 5},
            **{"intermediate_size": 10, "num_experts": 3},
        },
    ),
    (
        *("cohere2_moe", 1),  # a prefix with windows, whose full layer is not rotated; sigmoids
        {
            **{**SMALL, **COHERE_MOE, "first_k_dense_replace": 2, "num_hidden_layers": 4},
            **{"prefix_dense_sliding_window_pattern": 2, "sliding_window_pattern": 2},
            **{"expert_selection_fn": "sigmoid", "num_shared_experts": 2},
            "shared_expert_combination_strategy": "average",
        },
    ),
    (
        *("cohere2_moe", 2),  # types of layers in any order, and RMSNorm
        {
            **{**SMALL, **COHERE_MOE, "rms_norm_eps": 1e-3, "num_shared_experts": 1},
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "mlp_layer_types": ["sparse", "dense", "dense"],
            **{"expert_selection_fn": "sigmoid", "norm_topk_prob": False},
            "shared_expert_combination_strategy": "sum",
        },
    ),
    ("cohere2_moe", 3, {**SMALL, **COHERE_MOE, "num_hidden_layers": 2, "num_shared_experts": 1}),
]


def draw(family: str, rng: np.random.Generator, given: dict) -> dict:
    """A random config.json, `given` fields aside; every draw is made whether or not the family uses it."""

    def pick(*values):
        return values[int(rng.integers(len(values)))]

    kv, group, head = pick(1, 2, 3), pick(1, 2, 3), pick(4, 6, 8, 10)
    heads = kv * group
    sizes = {
        "vocab_size": int(rng.integers(60, 120)),
        "hidden_size": heads * pick(4, 6, 8),
        "intermediate_size": int(rng.integers(11, 50)),
        "num_hidden_layers": int(rng.integers(1, 5)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
    }
    sizes |= {name: given[name] for name in sizes if name in given}
    act, window = pick("silu", "gelu", "gelu_pytorch_tanh", "relu"), int(rng.integers(2, 8))
    eps, theta = pick(1e-6, 1e-5, 1e-3), pick(5e2, 1e4, 5e5)
    tied, bias, bias2, flag = (bool(rng.integers(2)) for _ in range(4))
    first = int(rng.integers(0, sizes["num_hidden_layers"] + 1))
    cap, cap2 = pick(None, 1.5, 5.0), pick(None, 3.0, 30.0)
    scale, scalar = pick(0.0625, 0.25, 0.8333), int(rng.integers(3, 40))
    experts = int(rng.integers(2, 7))
    top_k = int(rng.integers(1, experts + 1))
    scaling = pick(None, LLAMA3, {"rope_type": "linear", "factor": 2.5})
    if family == "gpt2":
        return {
            "vocab_size": sizes["vocab_size"],
            "n_embd": sizes["hidden_size"],
            "n_layer": sizes["num_hidden_layers"],
            "n_head": heads,
            "n_positions": 40,
            "n_inner": pick(None, sizes["intermediate_size"]),
            "activation_function": pick("gelu_new", act),
            "layer_norm_epsilon": eps,
            "tie_word_embeddings": tied,
            "scale_attn_weights": bias,
        }
    config = {**sizes, "rope_theta": theta, "hidden_act": act, "tie_word_embeddings": tied}
    if family != "cohere2":
        config["head_dim"] = head
    if family.startswith("cohere"):
        config |= {"layer_norm_eps": eps, "logit_scale": scale, "attention_bias": bias}
    else:
        config["rms_norm_eps"] = eps
    if family == "cohere":
        config["use_qk_norm"] = flag
    if family == "cohere2":
        head = sizes["hidden_size"] // heads
        config["sliding_window"] = window
        if flag:
            config["layer_types"] = [
                pick("sliding_attention", "full_attention")
                for _ in range(sizes["num_hidden_layers"])
            ]
    if family == "llama":
        config |= {"attention_bias": bias, "mlp_bias": bias2}
        if scaling:
            config["rope_parameters"] = scaling
    if family in ("mistral", "mixtral"):
        config["sliding_window"] = window if flag else None
    if family in ("qwen2", "qwen3"):
        config |= {"use_sliding_window": flag, "sliding_window": window, "max_window_layers": first}
    if family == "qwen3":
        config["attention_bias"] = bias
    if family == "mixtral":
        config |= {"num_local_experts": experts, "num_experts_per_tok": top_k}
    if family in ("gemma2", "gemma3_text"):
        config |= {
            "attention_bias": bias,
            "sliding_window": window,
            "query_pre_attn_scalar": scalar,
            "final_logit_softcapping": cap2,
            "hidden_activation": act,
        }
    if family == "gemma2":
        config["attn_logit_softcapping"] = cap
    if family in ("olmo2", "olmo3", "smollm3", "apertus", "qwen3_moe"):
        config["attention_bias"] = bias
    if family == "olmo3":
        config["sliding_window"] = window
    if family == "smollm3":
        config |= {"mlp_bias": bias2, "no_rope_layer_interval": pick(2, 3, 4)}
    if family == "apertus":
        config["hidden_act"] = "xielu"
    if family == "qwen3_moe":
        config |= {"num_experts": experts, "num_experts_per_tok": top_k, "norm_topk_prob": flag}
        config |= {"moe_intermediate_size": sizes["intermediate_size"] - 4}
        config |= {"use_sliding_window": bias2, "sliding_window": window}
    if family == "cohere2_moe":
        config |= {"num_experts": experts, "num_experts_per_tok": top_k, "sliding_window": window}
        config |= {"expert_selection_fn": pick("softmax", "sigmoid"), "norm_topk_prob": flag}
        config |= {"num_shared_experts": pick(0, 1, 2), "first_k_dense_replace": first}
        config |= {"shared_expert_combination_strategy": pick("average", "sum")}
        config |= {"prefix_dense_sliding_window_pattern": pick(1, 2, 3)}
        config |= {"prefix_dense_intermediate_size": pick(None, 9), "rms_norm_eps": pick(None, eps)}
    if family == "gpt_neox":
        unread = ("head_dim", "num_key_value_heads", "rms_norm_eps", "rope_theta")
        config = {key: value for key, value in config.items() if key not in unread}
        config |= {"layer_norm_eps": eps, "attention_bias": bias, "use_parallel_residual": flag}
        config |= {"rotary_emb_base": theta, "rotary_pct": 1.0}
    return config


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Values that show every term: gains far from 1, biases far from 0; all of them float16 ones."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in name or ".ln_" in name:
                # Gains, Gemma's as distances from 1, and biases of norms.
                centre = 1.0 if name.endswith("weight") and value.mean() > 0.5 else 0.0
                noise = centre + 0.3 * noise
            elif value.ndim == 1:
                noise = 0.3 * noise
            elif "embed" in name or "wte" in name or "wpe" in name:
                noise = 0.7 * noise
            else:
                noise = noise * value.shape[-1] ** -0.5
            value.copy_(noise.half().float())
        for name, value in model.named_buffers():
            if ".act_fn." in name:  # numbers that are stored with the weights
                value.copy_(value.half().float())


def reference(model, tokens: np.ndarray, offset: int = 0) -> np.ndarray:
    """log p of every token of the vocabulary after each of `tokens`, [T, V]."""
    ids = torch.tensor(tokens)[None]
    positions = torch.arange(len(tokens))[None] + offset
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return torch.log_softmax(logits.float(), -1)[0].numpy()


def make(family: str, seed: int, given: dict) -> dict:
    rng = np.random.default_rng([seed, FAMILIES.index(family)])
    config = draw(family, rng, given) | given
    made = transformers.AutoConfig.for_model(
        family, bos_token_id=None, eos_token_id=None, pad_token_id=None, **config
    )
    made._attn_implementation = made._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    randomise(model, torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        written = json.loads((pathlib.Path(directory) / "config.json").read_text())
        tensors = load_file(pathlib.Path(directory) / "model.safetensors")
    window = config.get("sliding_window") or 5
    lengths = (window - 1, window, window + 1, 13) if window > 1 else (1, 2, 13)
    documents = [rng.integers(0, config["vocab_size"], length) for length in lengths]
    offset = 0 if family == "gpt2" else int(rng.integers(5000, 9000))
    case = {f"tensor/{name}": value.astype(np.float16) for name, value in tensors.items()}
    for name, value in tensors.items():
        assert (case[f"tensor/{name}"] == value).all(), name
    for i, document in enumerate(documents):
        case[f"tokens/{i}"] = document.astype(np.int32)
        case[f"logprobs/{i}"] = reference(model, document)
    case["offset"] = np.int32(offset)
    case["shifted"] = reference(model, documents[-1], offset)
    case["config"] = np.array(json.dumps(written))
    return case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "parity")
    parser.add_argument(
        "--seed", type=int, help="random cases from this seed instead of the goldens"
    )
    parser.add_argument("--family", nargs="+", choices=FAMILIES, help="of these families only")
    parser.add_argument("--count", type=int, default=2, help="random cases of each family")
    arguments = parser.parse_args()
    cases = [case for case in FIXED if case[0] in (arguments.family or FAMILIES)]
    if arguments.seed is not None:
        seeds = range(1000 * (1 + arguments.seed), 1000 * (1 + arguments.seed) + arguments.count)
        cases = [(family, seed, {}) for family in arguments.family or FAMILIES for seed in seeds]
    arguments.out.mkdir(parents=True, exist_ok=True)
    for family, seed, given in cases:
        np.savez_compressed(arguments.out / f"{family}_{seed}.npz", **make(family, seed, given))


if __name__ == "__main__":
    main()
