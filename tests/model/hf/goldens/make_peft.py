"""Adapters of peft on random small models, with the log-probabilities that peft gives them.

The goldens beside this file (peft/*.npz, for tests/launch/weights/peft_test.py) are made by

    .venv-peers/bin/python tests/model/hf/goldens/make_peft.py

    .venv-peers/bin/python tests/model/hf/goldens/make_peft.py --base HF_DIR --adapter PEFT_DIR --tokens 3,1,4

prints the log-probabilities of each next token, for adapters that `launch.convert --to_peft` has written.

A case holds config.json, tensors, adapter_config.json and the adapter's tensors as `save_pretrained` writes them, tokens, and
the float32 log-probabilities of each token given those before it, and of an encoder-decoder given `inputs`.
"""

import argparse
import json
import pathlib
import tempfile

import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import load_file
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
LLAMA = transformers.LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=32,
)
GPT2 = transformers.GPT2Config(
    vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, n_inner=24
)
NEOX = transformers.GPTNeoXConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
)
T5 = transformers.T5Config(
    vocab_size=40,
    d_model=16,
    d_kv=4,
    d_ff=24,
    num_layers=2,
    num_heads=2,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
    decoder_start_token_id=0,
)
MIXTRAL = transformers.MixtralConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_local_experts=3,
    num_experts_per_tok=2,
    max_position_embeddings=32,
)
QWEN3_MOE = transformers.Qwen3MoeConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    moe_intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    num_experts=3,
    num_experts_per_tok=2,
    norm_topk_prob=True,
    max_position_embeddings=32,
)
COHERE2_MOE = transformers.Cohere2MoeConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    num_experts=3,
    num_experts_per_tok=2,
    num_shared_experts=1,
    first_k_dense_replace=0,
    sliding_window=8,
    max_position_embeddings=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
APART = ["w1", "w2", "w3"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CASES = {
    "lora": (
        LLAMA,
        peft.LoraConfig(
            r=3,
            lora_alpha=6,
            target_modules=[*ATTENTION, "down_proj"],
            rank_pattern={"q_proj": 2, "layers.1.self_attn.o_proj": 1},
            alpha_pattern={"v_proj": 5},
        ),
    ),
    "rslora": (
        LLAMA,
        peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=".*(up|gate)_proj"),
    ),
    "dora": (LLAMA, peft.LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=ATTENTION)),
    "ia3": (
        LLAMA,
        peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    ),
    # In transformers 5 the experts are stacked parameters, no modules.
    "experts": (
        MIXTRAL,
        peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=EXPERTS),
    ),
    "qwen3_moe": (
        QWEN3_MOE,
        peft.LoraConfig(r=2, lora_alpha=4, target_modules=["o_proj"], target_parameters=EXPERTS),
    ),
    # With shared experts, which peft takes for modules.
    "cohere2_moe": (
        COHERE2_MOE,
        peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=EXPERTS),
    ),
    "experts_down": (
        MIXTRAL,
        peft.LoraConfig(
            r=2, lora_alpha=4, use_rslora=True, target_modules=[], target_parameters=EXPERTS[1:]
        ),
    ),
    "experts_ranks": (
        MIXTRAL,
        peft.LoraConfig(
            r=2,
            lora_alpha=4,
            target_modules=[],
            target_parameters=EXPERTS,
            rank_pattern={"experts.down_proj": 3, "layers.1.mlp.experts.gate_up_proj": 1},
            alpha_pattern={"experts.down_proj": 5},
        ),
    ),
    # As transformers 4 had them, each expert a module; peft stacks them when it reads them.
    "experts_apart": (MIXTRAL, peft.LoraConfig(r=2, lora_alpha=4, target_modules=APART)),
    "gpt2_lora": (
        GPT2,
        peft.LoraConfig(r=2, lora_alpha=4, fan_in_fan_out=True, target_modules=["c_attn", "c_fc"]),
    ),
    "neox_lora": (
        NEOX,
        peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query_key_value", "dense_h_to_4h"]),
    ),
    "t5_lora": (
        T5,
        peft.LoraConfig(
            task_type="SEQ_2_SEQ_LM", r=2, lora_alpha=4, target_modules=["q", "k", "v", "o", "wi_0"]
        ),
    ),
    "t5_ia3": (
        T5,
        peft.IA3Config(
            task_type="SEQ_2_SEQ_LM", target_modules=["k", "v", "wo"], feedforward_modules=["wo"]
        ),
    ),
}


def log_probs(
    model: torch.nn.Module, tokens: np.ndarray, inputs: np.ndarray | None = None
) -> np.ndarray:
    """The log-probability of each token after the first; the decoder's, if an encoder reads inputs."""
    ids = torch.tensor(tokens)[None]
    with torch.no_grad():
        if inputs is None:
            logits = model(input_ids=ids).logits[0].log_softmax(-1)
        else:
            read = torch.tensor(inputs)[None]
            logits = model(input_ids=read, decoder_input_ids=ids).logits[0].log_softmax(-1)
    return logits[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy()


def write_apart(folder: pathlib.Path, adapter: peft.LoraConfig) -> None:
    """Writes an adapter of Mixtral whose tensors are of single experts."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({**adapter.to_dict(), "target_modules": APART}, default=str)
    )
    width, hidden = MIXTRAL.hidden_size, MIXTRAL.intermediate_size
    tensors = {}
    for layer in range(MIXTRAL.num_hidden_layers):
        for expert in range(MIXTRAL.num_local_experts):
            for which in APART:
                rows, columns = (width, hidden) if which == "w2" else (hidden, width)
                module = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{which}"
                tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, columns)
                tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, 2) / 2
    save_file(tensors, folder / "adapter_model.safetensors")


def make(name: str, folder: pathlib.Path) -> dict[str, np.ndarray]:
    config, adapter = CASES[name]
    torch.manual_seed(sum(map(ord, name)))
    encodes = config.is_encoder_decoder
    auto = transformers.AutoModelForSeq2SeqLM if encodes else transformers.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    model.save_pretrained(folder / "base")
    if name == "experts_apart":
        write_apart(folder / "adapter", adapter)
        adapted = peft.PeftModel.from_pretrained(model, folder / "adapter").eval()
    else:
        adapted = peft.get_peft_model(model, adapter).eval()
        with torch.no_grad():
            for path, value in adapted.named_parameters():
                if "lora_" in path or "ia3_" in path:
                    value += 0.5 * torch.randn_like(value)
        adapted.save_pretrained(folder / "adapter")
    tokens = np.random.default_rng(0).integers(0, 40, 12)
    case = {"tokens": tokens}
    if encodes:
        tokens[0] = config.decoder_start_token_id
        case["inputs"] = np.random.default_rng(1).integers(0, 40, 7)
    case["log_probs"] = log_probs(adapted, tokens, case.get("inputs"))
    for part, settings, weights in (
        ("base", "config.json", "model.safetensors"),
        ("adapter", "adapter_config.json", "adapter_model.safetensors"),
    ):
        text = json.loads((folder / part / settings).read_text())
        case[f"{part}.json"] = np.array(json.dumps(text))
        tensors = load_file(folder / part / weights)
        case |= {f"{part}/{path}": value for path, value in tensors.items()}
    return case


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base")
    parser.add_argument("--adapter")
    parser.add_argument("--tokens", default="3,1,4,1,5")
    flags = parser.parse_args()
    if flags.base:
        model = transformers.AutoModelForCausalLM.from_pretrained(flags.base)
        adapted = peft.PeftModel.from_pretrained(model, flags.adapter).eval()
        print(json.dumps(log_probs(adapted, np.array(flags.tokens.split(","), int)).tolist()))
        return
    (HERE / "peft").mkdir(exist_ok=True)
    for name in CASES:
        if (HERE / "peft" / f"{name}.npz").exists():  # delete a golden to make it anew
            continue
        with tempfile.TemporaryDirectory() as folder:
            np.savez_compressed(HERE / "peft" / f"{name}.npz", **make(name, pathlib.Path(folder)))


if __name__ == "__main__":
    main()
