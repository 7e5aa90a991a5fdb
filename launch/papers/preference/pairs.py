"""Samples a model of the generated language twice for each prompt, and writes the preferences of a noisy judge.

The better of two texts of rewards r and s is the first with probability 1 / (1 + exp(s - r)) (Bradley and Terry):

  python -m launch.papers.preference.pairs --checkpoint=SFT --to=DIR --seed=0

It writes pairs.jsonl, of training prompts, and held_out.jsonl, of held-out prompts, to DIR.
"""

if __name__ == "__main__":
    from launch import cli
    from launch.run import load_run

    def add_flags(parser):
        load_run.add_flags(parser)
        parser.add_argument("--to", required=True, metavar="DIR", help="folder to write")
        parser.add_argument(
            "--seed", type=int, default=0, help="random seed of texts and judgements"
        )

    def start_run(start):
        from launch.papers.preference import pairs

        pairs.run(start)

    raise SystemExit(
        cli.main(
            __doc__,
            entry="launch.run.load_run:RunConfig",
            command="pairs",
            extra_flags=add_flags,
            run=start_run,
            default_files=load_run.default_files,
            unused={"MODEL": "None", "VOCABULARY": "None"},
        )
    )

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data.preference import topic_language
from launch.inference import generate, row_files
from trainers.decoding.sampling import Sampling
from trainers.decoding.settings import Settings

TRAIN_PAIRS = 2048
FILES = {"train": "pairs.jsonl", "validation": "held_out.jsonl"}
BATCH_SIZE = 256


def run(start: Any) -> None:
    """Samples, judges and writes as the flags say."""
    flags = start.flags
    folder = pathlib.Path(flags.to)
    folder.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        max_new_tokens=topic_language.LONGEST + 1,
        sampling=Sampling(temperature=1.0),
        num_samples=2,
    )
    texts = {split: prompts(split) for split in FILES}
    rows = [(split, {"text": prompt}) for split, some in texts.items() for prompt in some]
    samples = generate.generate(
        start(),
        rows,
        checkpoint=flags.checkpoint,
        params=flags.params,
        settings=settings,
        seed=flags.seed,
        batch_size=BATCH_SIZE,
    )
    judged = judge(list(samples), np.random.default_rng(flags.seed))
    for split, file in FILES.items():
        row_files.write(str(folder / file), [next(judged) for _ in texts[split]])


def prompts(split: str) -> list[str]:
    """Returns TRAIN_PAIRS prompts of the training split, in turn, or each held-out one once."""
    known = topic_language.prompts(split)
    count = TRAIN_PAIRS if split == "train" else len(known)
    return [known[i % len(known)] for i in range(count)]


def judge(samples: Sequence[Mapping[str, Any]], rng: np.random.Generator) -> Iterator[dict]:
    """Yields preference pairs from rows of launch.generate, in which two neighbours share a prompt."""
    for one, other in zip(samples[::2], samples[1::2], strict=True):
        rewards = [
            topic_language.reward(row["prompt"], row["text"], ended=row["ended"] == "eos")
            for row in (one, other)
        ]
        first = rng.random() < 1 / (1 + np.exp(rewards[1] - rewards[0]))
        chosen, rejected = (0, 1) if first else (1, 0)
        texts = one["text"], other["text"]
        yield {
            "prompt": one["prompt"],
            "chosen": texts[chosen],
            "rejected": texts[rejected],
            "chosen_reward": rewards[chosen],
            "rejected_reward": rewards[rejected],
        }
