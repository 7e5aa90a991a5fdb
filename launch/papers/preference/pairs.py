"""Samples a model of the generated language four times for each prompt, and writes a noisy judge's best and worst; best of n.

The judge adds noise of Gumbel's distribution to the reward of each text and orders them by the sums: of two texts of rewards r and s
the first is before the second with probability 1 / (1 + exp(s - r)) (Bradley and Terry; of more texts, Plackett and Luce).

  python -m espalier.launch.papers.preference.pairs --checkpoint=SFT --to=DIR --seed=0

It writes pairs.jsonl, of training prompts, and held_out.jsonl, of held-out prompts, to DIR, and best_of_n.json: the
P_win, against another sample of the model, of the best of n samples of it by their quality.
"""

if __name__ == "__main__":
    from espalier.launch import cli
    from espalier.launch.load import load_run

    def add_flags(parser):
        load_run.add_flags(parser)
        parser.add_argument(
            "--to", required=True, metavar="DIR", help="write the results to this folder"
        )
        parser.add_argument(
            "--seed", type=int, default=0, help="random seed of texts and judgements"
        )

    def start_run(start):
        from espalier.launch.papers.preference import pairs

        pairs.run(start)

    raise SystemExit(
        cli.main(
            __doc__,
            entry="espalier.launch.load.load_run:RunConfig",
            command="pairs",
            extra_flags=add_flags,
            run=start_run,
            default_files=load_run.default_files,
            unused={"MODEL": "None", "VOCABULARY": "None"},
        )
    )

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.inference import generate, row_files
from espalier.launch.papers.preference import topic_language
from espalier.trainers.decoding.sampling import Sampling
from espalier.trainers.decoding.settings import Settings
from espalier.trainers.preference.indicators import measures

TRAIN_PAIRS = 2048
JUDGED = 4  # samples of a prompt, of which the judge's best and worst are a pair
FILES = {"train": "pairs.jsonl", "validation": "held_out.jsonl"}
BATCH_SIZE = 256
BEST_OF = "best_of_n.json"
SIZES = (1, 2, 4, 8, 16, 32)  # the n of best of n
# As PreferenceIndicators samples.
_EVALUATED = Sampling(temperature=0.5, top_p=0.75)


def run(start: Any) -> None:
    """Samples, judges and writes as the flags say."""
    flags = start.flags
    folder = pathlib.Path(flags.to)
    folder.mkdir(parents=True, exist_ok=True)
    model = start()

    def sampled(rows: Sequence[tuple[str, dict]], count: int, sampling: Sampling) -> list[dict]:
        settings = Settings(
            max_new_tokens=topic_language.LONGEST + 1, sampling=sampling, num_samples=count
        )
        samples = generate.generate(
            model,
            rows,
            checkpoint=flags.checkpoint,
            params=flags.params,
            settings=settings,
            seed=flags.seed,
            batch_size=BATCH_SIZE,
        )
        return list(samples)

    texts = {split: prompts(split) for split in FILES}
    rows = {split: [(split, {"text": prompt}) for prompt in some] for split, some in texts.items()}
    pairs = sampled(
        [row for some in rows.values() for row in some], JUDGED, Sampling(temperature=1.0)
    )
    judged = judge(pairs, np.random.default_rng(flags.seed))
    for split, file in FILES.items():
        row_files.write(str(folder / file), [next(judged) for _ in texts[split]])
    many = sampled(rows["validation"], 1 + max(SIZES), _EVALUATED)
    (folder / BEST_OF).write_text(json.dumps(best_of(many)) + "\n")


def best_of(samples: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Returns n -> P_win of the best of n samples against the first, from rows with 1 + max(SIZES) samples a prompt."""
    rewards_PN = np.reshape([_reward(row) for row in samples], (-1, 1 + max(SIZES)))
    competitor_P, own_PN = rewards_PN[:, 0], rewards_PN[:, 1:]
    return {n: measures.win_probability(own_PN[:, :n].max(1), competitor_P) for n in SIZES}


def prompts(split: str) -> list[str]:
    """Returns TRAIN_PAIRS prompts of the training split, in turn, or each held-out one once."""
    known = topic_language.prompts(split)
    count = TRAIN_PAIRS if split == "train" else len(known)
    return [known[i % len(known)] for i in range(count)]


def judge(samples: Sequence[Mapping[str, Any]], rng: np.random.Generator) -> Iterator[dict]:
    """Yields preference pairs from rows of espalier generate, in which JUDGED neighbours share a prompt."""
    for start in range(0, len(samples), JUDGED):
        some = samples[start : start + JUDGED]
        rewards = [_reward(row) for row in some]
        order = np.argsort(rewards + rng.gumbel(size=JUDGED))
        chosen, rejected = int(order[-1]), int(order[0])
        yield {
            "prompt": some[0]["prompt"],
            "chosen": some[chosen]["text"],
            "rejected": some[rejected]["text"],
            "chosen_reward": rewards[chosen],
            "rejected_reward": rewards[rejected],
        }


def _reward(row: Mapping[str, Any]) -> float:
    return topic_language.reward(row["prompt"], row["text"], ended=row["ended"] == "eos")
