"""The metrics that runs log, by name, with unit and meaning: a metric without a row here fails the tests and the site.

A word in capitals in a name stands for any text. Held-out metrics are `eval/TASK/NAME` with the same names.
"""

import re
from collections.abc import Iterable

_LOSS = "of the objective"
# Where a metric comes from -> name -> (unit, meaning).
METRICS: dict[str, dict[str, tuple[str, str]]] = {
    "Every run": {
        "step": ("updates", "number of the row's last update, skipped updates included"),
        "time": ("s", "seconds since 1970 at which the row was written"),
        "loss": (
            _LOSS,
            "mean loss since the last row, without auxiliary losses: nats per token in language modelling",
        ),
        "source_loss/SOURCE": (_LOSS, "the loss on the rows of one source of a mixture"),
        "learning_rate": ("", "rate of the last update"),
        "grad_norm": ("", "L2 norm of the gradient before clipping"),
        "update_norm": ("", "L2 norm of the change of the trained parameters; 0 where an update was skipped"),
        "param_norm": ("", "L2 norm of all parameters"),
        "anomaly": ("share", "share of updates with a loss, gradient or update that is not finite, or a loss that spikes"),
        "skipped_updates": ("updates", "updates skipped so far because of anomalies"),
        "rollback_to": ("updates", "checkpoint to which an anomaly has taken the run back"),
        "skipped_batches": ("batches", "batches that this rollback skips"),
        "epochs/SOURCE": ("epochs", "passes through a source so far"),
        "tokens_per_second": ("tokens/s", "throughput of training, of all devices"),
        "images_per_second": ("images/s", "throughput of training, of all devices"),
        "model_flops_per_second": ("FLOP/s", "throughput times the model's FLOPs per token or image"),
        "mfu": ("share", "model FLOPs per second divided by the peak of the devices, where it is known"),
        "time/goodput": ("share", "share of the time of this start that was spent in steps"),
        "time/PART": (
            "s",
            "seconds of this start spent in a part: init, compile, restore, step, data, data_wait, generation, evaluation, checkpoint, other",
        ),
        "auxiliary_loss": (_LOSS, "sum of what layers add to the loss, such as a balance loss"),
    },
    "Held-out data": {
        "tokens": ("tokens", "number that the evaluation's means are over"),
        "pairs": ("pairs", "number that the evaluation's means are over"),
        "images": ("images", "number that the evaluation's means are over"),
        "perplexity": ("", "exponential of the loss in nats per token"),
        "bits_per_byte": ("bits per byte", "loss divided by ln 2 and by the text's bytes per token"),
    },
    "Language modelling, classification and distillation": {
        "accuracy": ("share", "of images whose class is the likeliest; of pairs that are ordered rightly"),
        "z_loss": ("nats per token", "the regulariser of the softmax's normaliser, times its weight"),
        "loss_per_sequence": ("nats per sequence", "with `AVERAGE_PER_SEQUENCE`: summed over a sequence's tokens"),
        "divergence": ("nats per token", "divergence of student and teacher, without its factors"),
        "distillation_loss": ("nats per token", "the minimised sum of divergence and cross-entropy"),
    },
    "Preferences": {
        "loss/NAME": ("per pair", "one of several losses, before its weight"),
        "logps/COMPLETION": (
            "nats per completion",
            "log-probability of chosen, rejected, desirable or undesirable completions",
        ),
        "llh/COMPLETION": ("nats per token", "the same per token, averaged over completions; `llh/gap` is chosen minus rejected"),
        "log_ratio/COMPLETION": (
            "nats per completion",
            "log-probability minus the reference's; `log_ratio/margin` is chosen minus rejected",
        ),
        "policy_weight": ("", "weight of a pair by its likelihood under the policy (WPO)"),
        "margin": ("", "of a reward model: reward of the chosen completion minus the rejected one's"),
    },
    "Online runs and rewards": {
        "reward": ("of the reward", "mean of all samples, minus the penalty for missing ends"),
        "reward/COMPLETION": ("of the reward", "of a reward model: mean of chosen or of rejected completions"),
        "reward/ended": ("share", "share of samples that ended before the maximum length"),
        "reward/tokens": ("tokens", "mean length of a sample"),
        "reward/margin": ("of the reward", "best minus worst sample of a prompt"),
        "ratio": ("", "mean over tokens of the policy's probability divided by the sampling policy's"),
        "kl": ("nats per token", "estimated divergence from the reference"),
        "value": ("of the reward", "mean of the predicted values (PPO)"),
        "value_loss": ("", "squared error of the values, before its weight (PPO)"),
    },
    "Experts and routers, averaged over layers": {
        "LAYER/router_load/EXPERT": ("share", "share of the choices that an expert gets"),
        "LAYER/router_load_max": ("share", "the largest of these"),
        "LAYER/router_load_max_worst_layer": ("share", "the largest of these in any layer"),
        "LAYER/router_entropy": ("nats", "mean entropy of a token's routing probabilities"),
        "LAYER/router_probability/EXPERT": ("probability", "mean weight of an expert"),
        "LAYER/router_top_probability": ("probability", "mean of a token's largest probability"),
        "LAYER/router_dropped": ("share", "share of the choices that a full expert drops"),
    },
    "Low-rank training": {
        "spectrum/effective_rank": ("", "nuclear norm divided by operator norm, averaged over matrices"),
        "spectrum/effective_step": ("", "learning rate divided by the mean squared Frobenius norm of the matrices"),
        "spectrum/frobenius": ("", "Frobenius norm, averaged over matrices"),
        "spectrum/operator": ("", "largest singular value, averaged over matrices"),
        "spectrum/nuclear": ("", "sum of the singular values, averaged over matrices"),
    },
}  # fmt: skip
# Below this prefix, docs/use/preference_indicators.md has the rows.
INDICATORS = "indicators/"


def general(name: str) -> str | None:
    """Returns the name of the row that explains a metric; None if there is none. The first row that fits counts."""
    bare = re.sub(r"^eval/[^/]+/", "", name)
    for rows in METRICS.values():
        exact = [row for row in rows if row == bare]
        patterns = [row for row in rows if re.fullmatch(re.sub("[A-Z]+", ".+", row), bare)]
        if exact or patterns:
            return (exact or patterns)[0]
    return None


def unexplained(names: Iterable[str]) -> list[str]:
    """Returns the metrics that have no row."""
    return [name for name in names if not name.startswith(INDICATORS) and general(name) is None]
