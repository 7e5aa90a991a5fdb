"""Writes trl_policy_gradient.json: what TRL's GRPO and RLOO make of given log-probabilities, with gradients.

  .venv-peers/bin/python tests/trainers/goldens/trl_policy_gradient.py

Made with trl 1.16.0, torch 2.13 and transformers 5.24. The losses are the trainers' own methods, called on objects that
hold nothing but their settings, with a function in the place of the model that gives the log-probabilities. All
numbers are float32 and written exactly; `gradient` is that of the loss by the policy's log-probabilities.
"""

import collections
import json
import os
import pathlib
import types

import torch

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.rloo_trainer import RLOOTrainer  # noqa: E402

T = 7
LENGTHS = [5, 7, 1, 4, 2, 6]
CASES = {
    "grpo": {},
    "grpo_beta": {"beta": 0.3},
    "grpo_high": {"epsilon_high": 0.28},
    "bnpo": {"loss_type": "bnpo"},
    "dapo": {"loss_type": "dapo", "beta": 0.1},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "gspo": {"importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1, "beta": 0.1},
}


def accelerator():
    return types.SimpleNamespace(
        num_processes=1,
        sync_gradients=True,
        device=torch.device("cpu"),
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
    )


def trainer(log_probs, **settings):
    """What the trainers' methods read of `self`."""
    return types.SimpleNamespace(
        **{
            "_get_per_token_logps_and_entropies": lambda *_, **__: (
                log_probs,
                torch.zeros_like(log_probs),
                None,
            ),
            "accelerator": accelerator(),
            "model": types.SimpleNamespace(training=True),
            "aux_loss_enabled": False,
            "top_entropy_quantile": 1.0,
            "off_policy_mask_threshold": None,
            "importance_sampling_level": "token",
            "beta": 0.0,
            "loss_type": "grpo",
            "epsilon_low": 0.2,
            "epsilon_high": 0.2,
            "use_vllm": False,
            "current_gradient_accumulation_steps": 1,
            "_entropy_bonus_enabled": False,
            "max_completion_length": T + 2,
            "_metrics": {mode: collections.defaultdict(list) for mode in ("train", "eval")},
            "args": types.SimpleNamespace(
                use_bias_correction_kl=False, delta=None, steps_per_generation=1
            ),
            **settings,
        }
    )


def evaluated(kind, given, **settings):
    log_probs = given["log_probs"].clone().requires_grad_()
    mask = given["mask"]
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 1).long(),
        "prompt_mask": torch.ones(len(mask), 1).long(),
        "completion_ids": torch.zeros_like(mask).long(),
        "completion_mask": mask.long(),
        "advantages": given["advantages"],
        "old_per_token_logps": given["old_log_probs"],
        "old_logps": (given["old_log_probs"] * mask).sum(1),
        "ref_per_token_logps": given["reference_log_probs"],
        "num_items_in_batch": mask.sum(),
    }
    loss = kind._compute_loss(trainer(log_probs, **settings), None, inputs)
    loss.backward()
    return {"loss": loss.item(), "gradient": log_probs.grad.tolist(), "settings": settings}


def main():
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(T)[None] < torch.tensor(LENGTHS)[:, None]).float()

    def near(x, scale):
        return (x + scale * torch.randn(x.shape, generator=generator)) * mask

    log_probs = -3 * torch.rand(len(LENGTHS), T, generator=generator) * mask
    given = {
        "mask": mask,
        "log_probs": log_probs,
        "old_log_probs": near(log_probs, 0.2),
        "reference_log_probs": near(log_probs, 0.5),
        "advantages": torch.randn(len(LENGTHS), generator=generator),
    }
    cases = {name: evaluated(GRPOTrainer, given, **case) for name, case in CASES.items()}
    cases["rloo"] = evaluated(RLOOTrainer, given)
    written = {name: array.tolist() for name, array in given.items()} | {"cases": cases}
    pathlib.Path(__file__).with_suffix(".json").write_text(json.dumps(written))


if __name__ == "__main__":
    main()
