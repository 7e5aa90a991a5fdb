"""Writes reward_model.npz: a Llama for sequence classification of transformers, and the loss of TRL's RewardTrainer.

  .venv-peers/bin/python tests/trainers/goldens/reward_model.py

Made with trl 1.16.0, torch 2.13 and transformers 5.24. The model is a random small one with one label; tensors are
float16 values, so that the file is small and exact. Texts are padded on the right, four chosen and then four rejected
ones. `rewards` are the model's scores of them, `loss/<center>` is what RewardTrainer makes of them with margins and a
weight of the term that centers rewards.
"""

import collections
import json
import pathlib
import types

import numpy as np
import torch
import transformers
from trl.trainer.reward_trainer import RewardTrainer

PAD = 0
CONFIG = transformers.LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_labels=1,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=2,
)
CHOSEN = [[1, 5, 6, 9, 2], [1, 7, 2], [1, 8, 4, 3, 30, 31, 2], [1, 5, 5, 2]]
REJECTED = [[1, 5, 6, 10, 11, 2], [1, 7, 7, 2], [1, 8, 4, 2], [1, 5, 20, 2]]
MARGINS = [0.0, 0.5, 1.0, 0.0]


def main():
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 1.0 + 0.1 * torch.randn_like(parameter)
            drawn = spread if parameter.ndim == 1 else 0.4 * torch.randn_like(parameter)
            parameter.copy_(drawn.half().float())
    texts = CHOSEN + REJECTED
    ids = torch.full((len(texts), max(map(len, texts))), PAD)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    with torch.no_grad():
        rewards = model(**inputs).logits[:, 0]
        losses = {}
        for center in (0.0, 0.1):
            itself = types.SimpleNamespace(
                model=model,
                args=types.SimpleNamespace(center_rewards_coefficient=center),
                accelerator=types.SimpleNamespace(
                    gather=lambda x: x, gather_for_metrics=lambda x: x
                ),
                _metrics={mode: collections.defaultdict(list) for mode in ("train", "eval")},
                _total_train_tokens=0,
                _tp_size=1,
            )
            given = {**inputs, "margin": torch.tensor(MARGINS)}
            losses[f"loss/{center}"] = RewardTrainer.compute_loss(itself, model, given).numpy()
    tensors = {f"tensor/{k}": v.numpy().astype(np.float16) for k, v in model.state_dict().items()}
    config = {**CONFIG.to_dict(), "architectures": ["LlamaForCausalLM"]}
    np.savez_compressed(
        pathlib.Path(__file__).with_suffix(".npz"),
        config=json.dumps(config),
        tokens=ids.numpy(),
        lengths=np.array(list(map(len, texts))),
        margins=np.array(MARGINS, np.float32),
        rewards=rewards.numpy(),
        **losses,
        **tensors,
    )


if __name__ == "__main__":
    main()
