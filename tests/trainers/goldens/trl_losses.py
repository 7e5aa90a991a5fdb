"""Writes trl_losses.json: what TRL's trainers make of given log-probabilities, with gradients.

  .venv-peers/bin/python tests/trainers/goldens/trl_losses.py

Made with trl 1.16.0, torch 2.13 and transformers 5.24. The losses are the trainers' own methods, called on objects that
hold nothing but their settings and, where they run a model, a model whose output is the log-probabilities of tokens.
All numbers are float32 and written exactly. `loss` is TRL's mean over the batch, and `gradients` are those of it;
`values` are the losses of batches of one pair, where a pair's loss does not depend on others.
"""

import collections
import json
import os
import pathlib
import types

import torch

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import trl  # noqa: E402
from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer  # noqa: E402
from trl.trainer.dpo_trainer import DPOTrainer  # noqa: E402
from trl.trainer.kto_trainer import KTOTrainer  # noqa: E402

P, T = 6, 12  # pairs, and positions after the first
CHOSEN_LENGTHS = [5, 12, 1, 7, 3, 9]
REJECTED_LENGTHS = [8, 4, 2, 7, 12, 1]
LABELS = [1, 0, 0, 1, 1, 0]

DPO = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 1e-3},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {"label_smoothing": 0.2},
    "aot_unpaired": {"label_smoothing": 0.2},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.05},
    "sft": {},
    "sigmoid_norm": {},
}
# Whose value of a pair depends on the other pairs.
OF_BATCHES = {"aot", "aot_unpaired", "sft"}
OF_MARGINS = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")
DIVERGENCES = {
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js": {"f_divergence_type": "js_divergence"},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
}
MIXTURE = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}

ACCELERATOR = types.SimpleNamespace(
    device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
)


def trainer(model=None, **settings):
    """What the trainers' methods read of `self`."""
    return types.SimpleNamespace(
        **{
            "accelerator": ACCELERATOR,
            "model": model,
            "aux_loss_enabled": False,
            "precompute_ref_logps": True,
            "_metrics": {mode: collections.defaultdict(list) for mode in ("train", "eval")},
            "_total_train_tokens": 0,
            "_tp_size": 1,
            **settings,
        }
    )


class Tokens(torch.nn.Module):
    """A model that says given log-probabilities of the tokens after the first."""

    def __init__(self, log_probs):
        super().__init__()
        self.log_probs = log_probs

    def forward(self, **_):
        unread = torch.zeros_like(self.log_probs)
        return types.SimpleNamespace(
            log_probs=self.log_probs, entropy=unread, mean_logits=unread, is_top1=unread.bool()
        )


def tokens(lengths, generator, low=-6.0):
    """[len(lengths), T] log-probabilities, 0 after the end, and their mask."""
    mask = torch.arange(T)[None] < torch.tensor(lengths)[:, None]
    return low * torch.rand(len(lengths), T, generator=generator) ** 2 * mask, mask


def batch(mask, **more):
    whole = torch.cat([torch.zeros(len(mask), 1, dtype=mask.dtype), mask], dim=1).long()
    ids = torch.ones_like(whole)
    return {"input_ids": ids, "attention_mask": ids, "completion_mask": whole, **more}


def of_dpo(log_probs, masks, references, **settings):
    """The loss of DPOTrainer on a batch, and its gradients by summed log-probabilities."""
    log_probs = torch.cat(log_probs).clone().requires_grad_()
    model = Tokens(log_probs)
    given = {"beta": 0.1, "label_smoothing": 0.0, "f_divergence_type": "reverse_kl", **settings}
    types_ = given.pop("loss_type")
    itself = trainer(
        model,
        loss_types=types_,
        loss_weights=given.pop("loss_weights", [1.0] * len(types_)),
        ld_alpha=None,
        use_weighting=False,
        f_alpha_divergence_coef=given.pop("f_alpha_divergence_coef", 0.5),
        args=types.SimpleNamespace(discopop_tau=given.pop("discopop_tau", 0.05)),
        **given,
    )
    chosen, rejected = references
    inputs = batch(torch.cat(masks), ref_chosen_logps=chosen, ref_rejected_logps=rejected)
    loss = DPOTrainer._compute_loss(itself, model, inputs, False)
    loss.backward()
    return loss, log_probs.grad[:, 0].chunk(2)


def dpo_case(data, name, **settings):
    log_probs, masks, references = data
    loss, gradients = of_dpo(log_probs, masks, references, **settings)
    found = {"loss": loss.item(), "gradients": [g.tolist() for g in gradients]}
    if not OF_BATCHES & set(settings["loss_type"]):
        one = (
            of_dpo(*[[x[i : i + 1] for x in of] for of in data], **settings)[0] for i in range(P)
        )
        found["values"] = [value.item() for value in one]
    named = {key: value for key, value in settings.items() if not key.startswith("f_")}
    return {"name": name, "settings": named, **found}


def direct_case(loss_fn, sums, name, **settings):
    """Of a method that reads log-probabilities, summed or not, as they are."""
    given = [s.clone().requires_grad_() for s in sums]
    values = loss_fn(trainer(**settings), *given)[0]
    values.mean().backward()
    return {
        "name": name,
        "settings": settings,
        "loss": values.mean().item(),
        "values": values.tolist(),
        "gradients": [s.grad.tolist() for s in given],
    }


def kto_case(log_probs, mask, reference, others, name, **settings):
    log_probs = log_probs.clone().requires_grad_()
    model = Tokens(log_probs)
    others, ref_others = others
    itself = trainer(
        model,
        loss_type=name,
        calculate_KL=name == "kto",
        _compute_kl_logps=lambda model, batch: others,
        **settings,
    )
    inputs = batch(
        mask, label=torch.tensor(LABELS).bool(), ref_logps=reference, ref_KL_logps=ref_others
    )
    loss = KTOTrainer._compute_loss(itself, model, inputs, False)
    loss.backward()
    gradients = [log_probs.grad[:, 0].tolist()]
    return {"name": name, "settings": settings, "loss": loss.item(), "gradients": gradients}


def main():
    generator = torch.Generator().manual_seed(0)
    chosen, chosen_mask = tokens(CHOSEN_LENGTHS, generator)
    rejected, rejected_mask = tokens(REJECTED_LENGTHS, generator)
    sums = [chosen.sum(1), rejected.sum(1)]
    references = [(s + 4 * torch.randn(P, generator=generator)).clamp(max=-0.1) for s in sums]
    data = [[chosen, rejected], [chosen_mask, rejected_mask], references]
    means = [s / m.sum(1) for s, m in zip(sums, (chosen_mask, rejected_mask), strict=True)]

    dpo = []
    for name, more in DPO.items():
        for beta in (0.1, 0.4):
            dpo.append(dpo_case(data, name, loss_type=[name], beta=beta, **more))
    for divergence, settings in DIVERGENCES.items():
        for name in OF_MARGINS:
            case = dpo_case(data, name, loss_type=[name], beta=0.1, **DPO[name], **settings)
            dpo.append({**case, "divergence": divergence})
    dpo.append(dpo_case(data, "mixture", beta=0.1, **MIXTURE))

    cpo = []
    for kind, of in (("sigmoid", sums), ("simpo", means)):
        for alpha in (0.0, 0.25) if kind == "simpo" else (0.0,):
            for label_smoothing in (0.0, 0.2):
                cpo.append(
                    direct_case(
                        CPOTrainer.cpo_loss,
                        of,
                        "cpo" if kind == "sigmoid" else "alpha_po" if alpha else "simpo",
                        loss_type=kind,
                        beta=2.0 if kind == "simpo" else 0.1,
                        alpha=alpha,
                        simpo_gamma=0.5,
                        label_smoothing=label_smoothing,
                    )
                )
    # TRL subtracts these from the likelihood's loss.
    orpo = [direct_case(ORPOTrainer.odds_ratio_loss, means, "orpo", beta=b) for b in (0.1, 0.5)]

    kto = []
    for sign in (1.0, -1.0):  # an estimate of the divergence above 0, and one below
        others = (sums[1], sums[1] - sign * torch.linspace(0.5, 3.0, P))
        for weights in ((1.0, 1.0), (1.5, 0.7)):
            case = kto_case(
                chosen,
                chosen_mask,
                references[0],
                others,
                "kto",
                beta=0.1,
                desirable_weight=weights[0],
                undesirable_weight=weights[1],
            )
            kto.append({**case, "ref_others": others[1].tolist()})
    case = kto_case(
        chosen,
        chosen_mask,
        references[0],
        (None, None),
        "apo_zero_unpaired",
        beta=0.1,
        desirable_weight=1.0,
        undesirable_weight=1.0,
    )
    kto.append(case)

    written = {
        "versions": {"trl": trl.__version__, "torch": torch.__version__},
        "chosen": sums[0].tolist(),
        "rejected": sums[1].tolist(),
        "ref_chosen": references[0].tolist(),
        "ref_rejected": references[1].tolist(),
        "chosen_length": CHOSEN_LENGTHS,
        "rejected_length": REJECTED_LENGTHS,
        "labels": LABELS,
        "dpo": dpo,
        "cpo": cpo,
        "orpo": orpo,
        "kto": kto,
    }
    path = pathlib.Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(written) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
