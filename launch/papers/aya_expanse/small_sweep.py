"""The whole of Aya Expanse (arXiv 2412.04261) in small: seven languages in three clusters, on words of installed packages.

A base; a teacher of each cluster; students of what each routing keeps of their answers; experts of the clusters, which part from
the joint model halfway, merged; the weights of a merge of six, one of them harmful; polish; offline and online preference training, by cluster with merges, and
jointly. The number of seeds after a colon:

  python -m launch.sweep --sweep launch/papers/aya_expanse/small_sweep.py:5 --out runs/aya_expanse/small --workers 2
"""

import ml_collections

from data.aya_expanse import lexicon
from launch.papers.aya_expanse.small_pool import PAIR_LANGUAGES
from launch.papers.shared import sweeps

GIN = "t5x_configs/experiments/aya_expanse/"
CPU = f"{GIN}cpu/"
STAGE = "launch.papers.aya_expanse.small_stage"
CLUSTERS = tuple(lexicon.FAMILIES)
ROUTINGS = ("single", "random", "fixed", "reward", "learned", "translated")
TEACHER_STEPS, STUDENT_STEPS = 500, 350
# The joint model's updates until experts part from it: merged from the base on, they were no model (score 0.10).
SHARED_STEPS = STUDENT_STEPS // 2
# A cluster has three of the seven languages, so that its expert reads its data as often as the joint model.
EXPERT_STEPS = round((STUDENT_STEPS - SHARED_STEPS) * 3 / 7)
OFFLINE_STEPS, ONLINE_STEPS, BY_LANGUAGES_STEPS = 60, 30, 40
CLUSTER_OFFLINE_STEPS, CLUSTER_ONLINE_STEPS = (
    round(steps * 3 / 7) for steps in (OFFLINE_STEPS, ONLINE_STEPS)
)
ROUNDS, ONLINE_ONLY_ROUNDS = 6, 4
BETAS = {"offline_beta001": 0.01, "offline_beta003": 0.03, "offline_beta03": 0.3}  # and 0.1
RATE = 2e-3  # of supervised stages
# Name -> (share of the rate, updates) of a polish after the merge.
POLISHES = {
    "polish_tenth": (0.1, 50),
    "polish_tenth_long": (0.1, 100),
    "polish_twentieth": (0.05, 50),
    "polish_full": (1.0, 50),
}
# The six of the search: experts, the joint model, a harmful one, and a copy of the first.
SIX = (
    *(f"expert_{name}" for name in CLUSTERS),
    "student_reward",
    "harmful",
    f"expert_{CLUSTERS[0]}",
)
HARMFUL = SIX.index("harmful")
EVALUATED = ("answers",)


def get_config(seeds: str = "5") -> ml_collections.ConfigDict:
    arms: dict[str, dict] = {
        "requests": _stage("requests", "--seed={SEED}"),
        "base": sweeps.arm(f"{CPU}base.gin", evaluations=()),
    }
    for name in CLUSTERS:
        arms[f"teacher_{name}"] = _sft(f"{{requests}}/teacher_{name}.jsonl", TEACHER_STEPS)
    teachers = [f"{{teacher_{name}}}" for name in CLUSTERS]
    pool = ("--requests={requests}", "--seed={SEED}", "--runs", *teachers)
    arms["pool"] = _stage("pool", *pool)
    for name in ROUTINGS:
        arms[f"student_{name}"] = _sft(f"{{pool}}/sft_{name}.jsonl", STUDENT_STEPS)
    arms["shared"] = _sft("{pool}/sft_reward.jsonl", SHARED_STEPS)
    for name in CLUSTERS:
        data = f"{{pool}}/sft_reward_{name}.jsonl"
        arms[f"expert_{name}"] = _sft(data, EXPERT_STEPS, parent="shared")
    arms["merged"] = _merge([f"expert_{name}" for name in CLUSTERS])
    for name, (share, steps) in POLISHES.items():
        data = "{pool}/sft_reward.jsonl"
        arms[name] = _sft(data, steps, f"LEARNING_RATE={RATE * share!r}", parent="merged")
    arms |= _weights()
    arms |= _joint_preferences()
    arms |= _merged_preferences()
    answers = {"call": "launch.papers.aya_expanse.small_answers:score"}
    divergence = {"call": "launch.papers.aya_expanse.small_answers:divergence"}
    return sweeps.config(
        arms, seeds=seeds, evaluations={"answers": answers, "divergence": divergence}
    )


def _weights() -> dict[str, dict]:
    """Returns the arms of the search of weights among the six."""
    six = [f"{{{arm}}}" for arm in SIX]
    return {
        "harmful": _sft("{pool}/sft_harmful.jsonl", EXPERT_STEPS, parent="shared"),
        "search": _stage("search", "--requests={requests}", "--seed={SEED}", "--runs", *six),
        "six_searched": _stage("searched", "--search={search}", evaluations=EVALUATED),
        "six_uniform": _merge(SIX),
        "six_spherical": _merge(SIX, "--method=multislerp"),
        "six_ties": _merge(SIX, "--method=ties", "--base={shared}"),
    }


def _joint_preferences() -> dict[str, dict]:
    """Returns the arms of preference training of the joint model."""
    start = "student_reward"
    arms = {"offline": _offline("{pool}/pairs.jsonl", OFFLINE_STEPS, parent=start, kl=True)}
    for name, beta in BETAS.items():
        settings = (f"BETA={beta}",)
        arms[name] = _offline("{pool}/pairs.jsonl", OFFLINE_STEPS, *settings, parent=start, kl=True)
    as_many = OFFLINE_STEPS + 3 * ONLINE_STEPS  # as offline, then three rounds
    arms["offline_long"] = _offline("{pool}/pairs.jsonl", as_many, parent=start)
    for number in PAIR_LANGUAGES:
        pairs = f"{{pool}}/pairs_{number}.jsonl"
        arms[f"offline_languages{number}"] = _offline(pairs, BY_LANGUAGES_STEPS, parent=start)
    native = "{pool}/pairs_native.jsonl"
    arms["native"] = _offline(native, BY_LANGUAGES_STEPS, parent="student_translated")
    prompts = "{requests}/online.jsonl"
    for number in range(1, ROUNDS + 1):
        before = f"round{number - 1}" if number > 1 else "offline"
        arms[f"round{number}"] = _online(prompts, ONLINE_STEPS, parent=before)
    for number in range(1, ONLINE_ONLY_ROUNDS + 1):
        before = f"online{number - 1}" if number > 1 else start
        steps = OFFLINE_STEPS if number == 1 else ONLINE_STEPS  # as many in all
        arms[f"online{number}"] = _online(prompts, steps, parent=before)
    return arms


def _merged_preferences() -> dict[str, dict]:
    """Returns the arms of preference training by cluster, with a merge after each stage."""
    arms = {}
    for name in CLUSTERS:
        pairs = f"{{pool}}/pairs_{name}.jsonl"
        arms[f"offline_{name}"] = _offline(pairs, CLUSTER_OFFLINE_STEPS, parent="polish_tenth")
    arms["merged_offline"] = _merge([f"offline_{name}" for name in CLUSTERS])
    for name in CLUSTERS:
        prompts = f"{{requests}}/online_{name}.jsonl"
        arms[f"online_{name}"] = _online(prompts, CLUSTER_ONLINE_STEPS, parent="merged_offline")
    arms["merged_online"] = _merge([f"online_{name}" for name in CLUSTERS])
    return arms


def _stage(stage: str, *words: str, evaluations: tuple[str, ...] = ()) -> dict:
    return sweeps.made(STAGE, stage, *words, "--to={run}", evaluations=evaluations)


def _merge(arms: tuple[str, ...] | list[str], *flags: str) -> dict:
    words = (*flags, "--runs", *(f"{{{arm}}}" for arm in arms))
    return _stage("merge", *words, evaluations=EVALUATED)


def _sft(data: str, steps: int, *bindings: str, parent: str = "base") -> dict:
    return _trained("sft", f"CHATS={data!r}", steps, *bindings, parent=parent)


def _offline(data: str, steps: int, *bindings: str, parent: str, kl: bool = False) -> dict:
    evaluations = (*EVALUATED, "divergence") if kl else EVALUATED
    return _trained(
        "preference", f"PAIRS={data!r}", steps, *bindings, parent=parent, evaluations=evaluations
    )


def _online(data: str, steps: int, *, parent: str) -> dict:
    return _trained("online", f"PROMPT_FILES={data!r}", steps, parent=parent)


def _trained(
    kind: str, data: str, steps: int, *bindings: str, parent: str, evaluations=EVALUATED
) -> dict:
    files = ("cpu/model_base.gin", f"{kind}.gin", "vocabulary_base.gin", f"cpu/{kind}.gin")
    return sweeps.arm(
        *(f"{GIN}{name}" for name in files),
        bindings=("BASE='{base}'", data, f"TRAIN_STEPS={steps}", *bindings),
        parent=parent,
        evaluations=evaluations,
    )
