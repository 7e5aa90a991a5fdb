"""Rewards of the answers of a pool of teachers: exact scorers, reward models, and judges of pairs. Each is stored once."""

import functools
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.data.aya_expanse.prompts import UNKNOWN, Prompt
from espalier.data.cache import fingerprint
from espalier.data.languages import table
from espalier.launch.inference import row_files
from espalier.launch.prepare import best_of_n
from espalier.launch.prepare.best_of_n import RewardFlags

_JUDGE = "judge:"
_VERSION = 1  # raise it when an exact scorer's rewards change
_READ = 2  # raise it when a reward model is read at another token of an answer
_JUDGED = 2  # raise it when judges are asked something else about a prompt
REWARDS, JUDGEMENTS = "rewards.jsonl", "judgements.jsonl"

# The answers to one prompt by teacher: rows of `completions.Store`.
Answers = Mapping[str, Mapping[str, Any]]


def check(flags: RewardFlags) -> None:
    """Raises an error unless the reward is known."""
    if not flags.reward.startswith(_JUDGE):
        best_of_n.checkpoint_of(flags.reward)
        return
    from espalier.launch.evaluate.judges import spec

    spec.parse(flags.reward.removeprefix(_JUDGE))


class Rewards:
    """Rewards answers, and stores the rewards in a folder.

    A judge, who also learns the prompt's language, compares every two answers to a prompt; an answer's reward is the share of comparisons that it wins, a tie
    counting one half. Answers that no comparison could judge have no reward.

    Args:
      flags: `best_of_n.RewardFlags`, whose reward may also be judge:SPEC, see launch/evaluate/judges/spec.py.
      folder: of the files `rewards.jsonl` and, for a judge, `judgements.jsonl`.
    """

    def __init__(self, flags: RewardFlags, folder: pathlib.Path):
        self._flags, self._folder = flags, folder

    @functools.cached_property
    def version(self) -> str:
        """A digest of everything besides the answers that the rewards depend on."""
        flags = self._flags
        identity: Any
        if flags.reward.startswith(_JUDGE):
            identity = [self._judge.identity, _JUDGED]
        elif (checkpoint := best_of_n.checkpoint_of(flags.reward)) is None:
            identity = [flags.reward, flags.answer_key, flags.answer_pattern, _VERSION]
        else:
            from espalier.launch.evaluate.judges.checkpoint import weights_identity
            from espalier.launch.load import load_run
            from espalier.trainers.checkpoints import step_dir

            step = str(step_dir.resolve(checkpoint))
            text = load_run.configuration_of(step).text
            identity = [weights_identity(step, settings=text, params="auto"), _READ]
        return fingerprint.of_json([identity, flags.missing_end_penalty])[:32]

    def __call__(
        self, prompts: Sequence[Prompt], answers: Sequence[Answers]
    ) -> list[dict[str, float]]:
        """Returns the rewards of the answers to each prompt, by teacher.

        Raises:
          RewardError, JudgeError, LoadError and others: an answer that cannot be rewarded.
        """
        if self._flags.reward.startswith(_JUDGE):
            return self._judged(prompts, answers)
        with row_files.resumed(self._folder / REWARDS) as file:
            stored = {row.get("key"): row.get("reward") for _, row in file.rows}
            read = {
                (p, name): self._row(prompts[p], row)
                for p, by_name in enumerate(answers)
                for name, row in by_name.items()
            }
            keys = {
                place: fingerprint.of_json([self.version, row])[:32] for place, row in read.items()
            }
            missing = [place for place, key in keys.items() if key not in stored]
            rows = [(prompts[place[0]].where, read[place]) for place in missing]
            made = best_of_n.rewards_of(rows, self._flags, self._config) if rows else []
            for place, reward in zip(missing, made, strict=True):
                stored[keys[place]] = reward
                about = {"id": prompts[place[0]].id, "teacher": place[1], "version": self.version}
                file.add({"key": keys[place], **about, "reward": reward})
        return [
            {name: float(stored[keys[p, name]]) for name in by_name}
            for p, by_name in enumerate(answers)
        ]

    def _config(self) -> Any:
        from espalier.launch.load import load_run

        return load_run.config_of(str(best_of_n.checkpoint_of(self._flags.reward)))

    def _row(self, prompt: Prompt, answer: Mapping[str, Any]) -> dict[str, Any]:
        """Returns an answer as a row of espalier generate. Endpoints write "stop" for an end token."""
        text = prompt.prompt if isinstance(prompt.prompt, str) else prompt.messages
        ended = "length" if answer["ended"] == "length" else "eos"
        return {**prompt.columns, "prompt": text, "text": answer["text"], "ended": ended}

    @functools.cached_property
    def _judge(self) -> Any:
        from espalier.launch.evaluate.judges import spec
        from espalier.launch.evaluate.judges.pairwise import Template
        from espalier.launch.load import load_run

        chosen = spec.parse(self._flags.reward.removeprefix(_JUDGE))
        config, text = None, ""
        if chosen.checkpoint is not None:
            configuration = load_run.configuration_of(chosen.checkpoint)
            run: Any = configuration.entry
            config, text = run(), configuration.text
        wording = Template()
        return spec.build(chosen, attempts=None, wording=wording, config=config, config_text=text)

    def outcomes(
        self, prompts: Sequence[Prompt], answers: Sequence[Answers], a: str, b: str
    ) -> tuple[list[Any], list[Any]]:
        """Returns a `judges.asking.Pair` and its `Outcome` for each prompt: the answers of two teachers, compared.

        A judge compares them as in `espalier evaluate win_rate`. By any other reward the answer with the larger one wins, and
        equal rewards are a tie.

        Args:
          answers: to each prompt, among others those of the teachers a and b.
        """
        from espalier.launch.evaluate.judges.asking import TIE, A, B, Outcome

        pairs = [_pair(prompt, row, a, b) for prompt, row in zip(prompts, answers, strict=True)]
        if self._flags.reward.startswith(_JUDGE):
            return pairs, self._asked(pairs)
        rewards = self(prompts, [{name: row[name] for name in (a, b)} for row in answers])
        differences = [row[a] - row[b] for row in rewards]
        return pairs, [Outcome(verdict=A if d > 0 else B if d < 0 else TIE) for d in differences]

    def _asked(self, pairs: Sequence[Any]) -> list[Any]:
        from espalier.launch.evaluate.judges import asking

        with asking.Journal.opened(self._folder / JUDGEMENTS) as journal:
            return asking.judge_pairs(self._judge, pairs, journal)[0]

    def _judged(
        self, prompts: Sequence[Prompt], answers: Sequence[Answers]
    ) -> list[dict[str, float]]:
        from espalier.launch.evaluate.judges.asking import TIE, A

        pairs, places = [], []
        for p, (prompt, by_name) in enumerate(zip(prompts, answers, strict=True)):
            for a, b in itertools.combinations(by_name, 2):
                pairs.append(_pair(prompt, by_name, a, b))
                places.append((p, a, b))
        outcomes = self._asked(pairs)
        shares: list[dict[str, list[float]]] = [{} for _ in prompts]
        for (p, a, b), outcome in zip(places, outcomes, strict=True):
            if outcome.verdict is None:
                continue
            won = 0.5 if outcome.verdict == TIE else float(outcome.verdict == A)
            shares[p].setdefault(a, []).append(won)
            shares[p].setdefault(b, []).append(1 - won)
        penalty = self._flags.missing_end_penalty
        return [
            {
                name: sum(won[name]) / len(won[name])
                - penalty * (by_name[name]["ended"] == "length")
                for name in by_name
                if name in won
            }
            for won, by_name in zip(shares, answers, strict=True)
        ]


def _pair(prompt: Prompt, answers: Answers, a: str, b: str) -> Any:
    from espalier.launch.evaluate.judges.asking import Pair

    text: Any = prompt.prompt if isinstance(prompt.prompt, str) else prompt.messages
    language = "" if prompt.language == UNKNOWN else table.name_of(prompt.language)
    shown = {"a": answers[a]["text"], "b": answers[b]["text"], "language": language}
    return Pair(id=prompt.id, prompt=text, **shown, systems=(a, b))
