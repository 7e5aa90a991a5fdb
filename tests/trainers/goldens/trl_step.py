"""Writes trl_step.json: losses and gradients of TRL's DPOTrainer for a model, a reference and a batch.

  .venv-peers/bin/python tests/trainers/goldens/trl_step.py

Made with trl 1.16.0, torch 2.13 and transformers 5.24. The policy is a toy Llama of tests/model/hf/goldens/parity, the
reference the same with its weights moved (`moved`), and the batch what TRL's own collator makes of a few pairs.
"""

import json
import os
import pathlib
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers
from trl import DPOConfig, DPOTrainer

HERE = pathlib.Path(__file__).parent
CASE = HERE.parents[1] / "model/hf/goldens/parity/llama_0.npz"
LOSSES = {
    "sigmoid": {},
    "ipo": {},
    "hinge": {},
    "ld_sigmoid": {"loss_type": ["sigmoid"], "ld_alpha": 0.4},
    "ld_ipo": {"loss_type": ["ipo"], "ld_alpha": 0.4},
    "wpo_sigmoid": {"loss_type": ["sigmoid"], "use_weighting": True},
    "wpo_ipo": {"loss_type": ["ipo"], "use_weighting": True},
    "mixture": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
}


def moved(tensor):
    """The weights of the reference."""
    return tensor + 0.1 * np.roll(tensor.reshape(-1), 1).reshape(tensor.shape)


def read():
    with np.load(CASE) as case:
        config = json.loads(str(case["config"]))
        names = [name for name in case.files if name.startswith("tensor/")]
        return config, {name.partition("/")[2]: case[name].astype(np.float32) for name in names}


def model_of(config, tensors):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).float()
    state = {name: torch.tensor(tensor) for name, tensor in tensors.items()}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    return model


def words(ids):
    return " ".join(f"t{i}" for i in ids)


def pairs(vocab):
    rng = np.random.default_rng(0)

    def some(low, high):
        return rng.integers(3, vocab, rng.integers(low, high)).tolist()

    rows = [(some(2, 6), some(1, 7), some(1, 7)) for _ in range(5)]
    return [
        {"prompt": words(p), "chosen": " " + words(c), "rejected": " " + words(r)}
        for p, c, r in rows
    ]


def main():
    config, tensors = read()
    vocab = config["vocab_size"]
    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({f"t{i}": i for i in range(vocab)}, unk_token="t0")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="t0", eos_token="t1", bos_token="t2"
    )
    rows = datasets.Dataset.from_list(pairs(vocab))
    found = {}
    for name, settings in LOSSES.items():
        policy = model_of(config, tensors)
        reference = model_of(config, {key: moved(x) for key, x in tensors.items()})
        with tempfile.TemporaryDirectory() as folder:
            arguments = DPOConfig(
                output_dir=folder,
                per_device_train_batch_size=len(rows),
                loss_type=settings.get("loss_type", [name]),
                loss_weights=settings.get("loss_weights"),
                ld_alpha=settings.get("ld_alpha"),
                use_weighting=settings.get("use_weighting", False),
                beta=0.3,
                bf16=False,
                use_cpu=True,
                report_to="none",
                disable_dropout=True,
                gradient_checkpointing=False,
                dataloader_pin_memory=False,
            )
            trainer = DPOTrainer(
                model=policy,
                ref_model=reference,
                args=arguments,
                train_dataset=rows,
                processing_class=wrapped,
            )
            batch = next(iter(trainer.get_train_dataloader()))
            policy.train()
            loss = trainer.compute_loss(policy, batch)
            loss.backward()
        gradients = [p.grad.norm() for p in policy.parameters() if p.grad is not None]
        norm = torch.stack(gradients).norm().item()
        found[name] = {"loss": loss.item(), "gradient_norm": norm}
        if "batch" not in found:
            found["batch"] = {
                "ids": batch["input_ids"].tolist(),
                "completion_mask": batch["completion_mask"].tolist(),
                "attention_mask": batch["attention_mask"].tolist(),
            }
    (HERE / "trl_step.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
