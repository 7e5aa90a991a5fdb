"""Writes generation.npz: what transformers generates from tiny random models, and its restrictions.

  .venv-peers/bin/python tests/trainers/goldens/make_generation.py

Made with torch 2.13 and transformers 5.24. The weights are stored under this project's names, with
kernels [in, out]. Prompts are padded on the left here, as transformers wants them; token 0, the
padding, begins every prompt, so that the repetition penalty (which counts padding) sees the same
tokens with and without it.
"""

import pathlib

import numpy as np
import torch
import transformers
from transformers.generation import logits_process as lp

V, D, L, N, F, P = 40, 16, 2, 2, 24, 64
PROMPTS = [[0, 8, 1, 4, 4, 6, 2, 11, 3, 20, 21], [0, 5, 9, 2, 7], [0, 3]]
NEW = 12
BEAMS = {
    "plain": {"num_beams": 3, "num_return_sequences": 3},
    "long": {"num_beams": 4, "length_penalty": 2.0, "num_return_sequences": 2},
    "short": {"num_beams": 3, "length_penalty": -1.0, "early_stopping": "never"},
    "never": {"num_beams": 3, "early_stopping": "never", "num_return_sequences": 3},
    "early": {"num_beams": 3, "early_stopping": True, "num_return_sequences": 2},
    "penalty": {"num_beams": 2, "repetition_penalty": 1.7, "num_return_sequences": 2},
}


def llama():
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=N,
        num_key_value_heads=1,
        max_position_embeddings=P,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        initializer_range=0.4,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=V,
        n_embd=D,
        n_inner=F,
        n_layer=L,
        n_head=N,
        n_positions=P,
        layer_norm_epsilon=1e-5,
        initializer_range=0.4,
    )
    return transformers.GPT2LMHeadModel(config)


def llama_names(state):
    names = {"model.embed_tokens.weight": "token_embed/embedding"}
    names |= {"model.norm.weight": "final_norm/scale", "lm_head.weight": "lm_head/embedding"}
    found = {ours: state[theirs] for theirs, ours in names.items()}
    for i in range(L):
        layer, block = f"model.layers.{i}", f"layers/block_{i}"
        found[f"{block}/norm/scale"] = state[f"{layer}.input_layernorm.weight"]
        found[f"{block}/mlp_norm/scale"] = state[f"{layer}.post_attention_layernorm.weight"]
        for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
            found[f"{block}/attention/{ours}/kernel"] = state[
                f"{layer}.self_attn.{theirs}_proj.weight"
            ].T
        for ours in ("gate", "up", "down"):
            found[f"{block}/mlp/{ours}/kernel"] = state[f"{layer}.mlp.{ours}_proj.weight"].T
    return found


def gpt2_names(state):
    found = {
        "token_embed/embedding": state["transformer.wte.weight"],
        "positions/embedding": state["transformer.wpe.weight"],
        "final_norm/scale": state["transformer.ln_f.weight"],
        "final_norm/bias": state["transformer.ln_f.bias"],
    }
    for i in range(L):
        layer, block = f"transformer.h.{i}", f"layers/block_{i}"
        for theirs, ours in (("ln_1", "norm"), ("ln_2", "mlp_norm")):
            found[f"{block}/{ours}/scale"] = state[f"{layer}.{theirs}.weight"]
            found[f"{block}/{ours}/bias"] = state[f"{layer}.{theirs}.bias"]
        for j, ours in enumerate(("query", "key", "value")):
            part = slice(j * D, (j + 1) * D)
            found[f"{block}/attention/{ours}/kernel"] = state[f"{layer}.attn.c_attn.weight"][
                :, part
            ]
            found[f"{block}/attention/{ours}/bias"] = state[f"{layer}.attn.c_attn.bias"][part]
        for theirs, ours in (
            ("attn.c_proj", "attention/out"),
            ("mlp.c_fc", "mlp/up"),
            ("mlp.c_proj", "mlp/down"),
        ):
            found[f"{block}/{ours}/kernel"] = state[f"{layer}.{theirs}.weight"]
            found[f"{block}/{ours}/bias"] = state[f"{layer}.{theirs}.bias"]
    return found


def generated(model, **options):
    """New tokens of every prompt, -1 after the end, and scores of beams."""
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    tokens = out.sequences[:, longest:].numpy()
    padded = np.full((len(tokens), NEW), -1)
    padded[:, : tokens.shape[1]] = tokens
    eos = options.get("eos_token_id") or []
    for row in padded:
        ends = np.flatnonzero(np.isin(row, eos))
        if len(ends):
            row[ends[0] + 1 :] = -1
    return padded, getattr(out, "sequences_scores", None)


def main():
    found = {}
    for name, make, rename in (("llama", llama, llama_names), ("gpt2", gpt2, gpt2_names)):
        torch.manual_seed(3)
        model = make().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # biases and gains that do something
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        for key, value in rename(model.state_dict()).items():
            found[f"{name}/weights/{key}"] = value.numpy()
        greedy, _ = generated(model)
        found[f"{name}/greedy"] = greedy
        found[f"{name}/penalty"], _ = generated(model, repetition_penalty=1.7)
        # Tokens that greedy rows contain end some beams early, and others never.
        eos = [int(greedy[0][3]), int(greedy[2][6])]
        found[f"{name}/eos"] = np.array(eos)
        for case, options in BEAMS.items():
            tokens, scores = generated(model, eos_token_id=eos, **options)
            found[f"{name}/beams/{case}/tokens"] = tokens
            found[f"{name}/beams/{case}/scores"] = scores.numpy()

    torch.manual_seed(0)
    logits = 3 * torch.randn(6, 30)
    ids = torch.randint(0, 30, (6, 9))
    found["logits"], found["ids"] = logits.numpy(), ids.numpy()
    processors = {
        "repetition_penalty": lp.RepetitionPenaltyLogitsProcessor(1.6),
        "temperature": lp.TemperatureLogitsWarper(0.7),
        "top_k": lp.TopKLogitsWarper(8),
        "top_p": lp.TopPLogitsWarper(0.8),
        "min_p": lp.MinPLogitsWarper(0.1),
    }
    for name, processor in processors.items():
        found[f"alone/{name}"] = processor(ids, logits.clone()).numpy()
    # The order is that of generate itself.
    config = transformers.GenerationConfig(
        do_sample=True, repetition_penalty=1.6, temperature=0.7, top_k=8, top_p=0.8, min_p=0.1
    )
    model = llama()
    model._prepare_special_tokens(config)
    both = model._get_logits_processor(config, input_ids_seq_length=9)
    found["order"] = np.array([type(p).__name__ for p in both])
    found["together"] = both(ids, logits.clone()).numpy()
    np.savez_compressed(pathlib.Path(__file__).with_name("generation.npz"), **found)


if __name__ == "__main__":
    main()
