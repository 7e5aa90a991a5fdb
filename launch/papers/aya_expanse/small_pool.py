"""The answers of the small experiment's pool, and what each routing makes of them: data of students, and pairs."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.data.aya_expanse.prompts import Prompt
from espalier.launch.papers.aya_expanse import lexicon

DEVIATION = 0.1  # of the reward's noise
NOISES = (0.0, 0.1, 0.3, 1.0, 10.0)  # deviations at which routing by reward is measured
TRANSLATION_LOSS = 0.15  # share of words that the translator takes from the other language
NEW_TOKENS = 24
ROUTINGS = ("reward", "learned", "fixed", "random")  # the first asks all teachers
# Number of languages in pairs -> the languages.
PAIR_LANGUAGES = {1: (lexicon.SHARED,), 7: lexicon.LANGUAGES}
QUALITIES = "qualities.json"
_BATCH = 128

Rows = list[dict[str, Any]]


def write(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as JSON lines."""
    from espalier.launch.inference import row_files

    path.parent.mkdir(parents=True, exist_ok=True)
    row_files.write(str(path), rows)


def answered(row: Mapping[str, str], text: str | None = None) -> dict[str, str]:
    """Returns a request as supervised data, with its reference as answer or another text."""
    request = {key: row[key] for key in ("id", "prompt", "language")}
    return {**request, "completion": row["answer"] if text is None else text}


class NoisyRewards:
    """The exact score with noise, as `launch.aya_expanse.route.Router` takes rewards."""

    def __init__(self, deviation: float, seed: int):
        self._deviation, self._seed = deviation, seed
        self.version = f"exact score, noise {deviation}, seed {seed}"

    def __call__(
        self, prompts: Sequence[Prompt], answers: Sequence[Mapping[str, Mapping[str, Any]]]
    ) -> list[dict[str, float]]:
        return [
            {name: self._reward(prompt, answer["text"]) for name, answer in by_name.items()}
            for prompt, by_name in zip(prompts, answers, strict=True)
        ]

    def _reward(self, prompt: Prompt, text: str) -> float:
        info = {**prompt.columns, "id": prompt.id, "language": prompt.language}
        return lexicon.noisy_score(text, info, deviation=self._deviation, seed=self._seed)


def answer(path: pathlib.Path, runs: Mapping[str, str], to: pathlib.Path, *, seed: int) -> None:
    """Asks the teachers, and writes the data of all students and preference stages.

    Args:
      path: the requests.
      runs: teacher -> its run, by the family that it was tuned on.
      to: gets sft_ROUTING.jsonl, sft_reward_FAMILY.jsonl, sft_tenth_FAMILY.jsonl, pairs*.jsonl and QUALITIES.
      seed: of sampling, of the reward's noise and of draws.
    """
    from espalier.data.aya_expanse import prompts as prompt_rows
    from espalier.launch.aya_expanse import completions
    from espalier.launch.inference import row_files

    requests = [row for _, row in row_files.read(str(path), example="{}", flag="requests")]
    prompts = prompt_rows.read([(row["id"], row) for row in requests])
    with completions.Store.opened(_folder(to) / "completions.jsonl") as store:
        pool = _Pool(runs, to, store, seed=seed)
        routed = {name: pool.route(name, prompts) for name in ROUTINGS}
        rewards = routed["reward"].rewards
        best = max(runs, key=lambda name: _mean(row.get(name) for row in rewards))
        routed["single"] = pool.route("single", prompts, teacher=best)
        english = [i for i, prompt in enumerate(prompts) if prompt.language == lexicon.SHARED]
        in_english = max(runs, key=lambda name: _mean(rewards[i].get(name) for i in english))
        translations = pool.translations(prompts, requests, in_english)
    texts = {name: _chosen_texts(one) for name, one in routed.items()}
    texts["translated"] = translations
    for name, chosen in texts.items():
        write(to / f"sft_{name}.jsonl", _sft(requests, chosen))
    _write_clusters(requests, texts, to, seed)
    _write_pairs(requests, routed["reward"], texts["fixed"], to)
    qualities = _qualities(requests, routed["reward"], texts, seed)
    (to / QUALITIES).write_text(json.dumps({**qualities, "single": best}, indent=1) + "\n", "utf-8")


def _folder(path: pathlib.Path) -> pathlib.Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _mean(values: Iterable[float | None]) -> float:
    """Returns the mean, in which an answer that cannot be used counts 0."""
    return float(np.mean([value or 0.0 for value in values]))


class _Pool:
    """Routes requests among the teachers, each of which is asked once."""

    def __init__(self, runs: Mapping[str, str], to: pathlib.Path, store: Any, *, seed: int):
        import yaml

        teachers = [
            {"name": name, "checkpoint": run, "batch_size": _BATCH} for name, run in runs.items()
        ]
        fixed = {code: name for name, codes in lexicon.FAMILIES.items() for code in codes}
        fixed[lexicon.SHARED] = next(iter(runs))  # all were tuned on it
        self._file = to / "pool.yaml"
        self._file.write_text(yaml.safe_dump({"teachers": teachers, "fixed": fixed}), "utf-8")
        self._to, self._store, self._seed = to, store, seed

    def route(
        self,
        routing: Any,
        prompts: Sequence[Prompt],
        teacher: str | None = None,
        *,
        rewarded: bool = True,
    ) -> Any:
        """Returns what `launch.aya_expanse.route.Router` does; prompts need an "answer" in their language if `rewarded`."""
        from espalier.data.aya_expanse import pool as pools
        from espalier.launch.aya_expanse.arbitrage import ArbitrageFlags
        from espalier.launch.aya_expanse.route import Router
        from espalier.launch.aya_expanse.teachers import SamplingFlags

        settings = ArbitrageFlags(
            pool=str(self._file),
            prompts="",
            out=str(self._to),
            routing=routing,
            teacher=teacher,
            form="prompt",
        )
        router = Router(
            settings,
            pools.read(self._file),
            self._store,
            sampling=SamplingFlags(max_tokens=NEW_TOKENS, seed=self._seed),
            rewards=NoisyRewards(DEVIATION, self._seed) if rewarded else None,
            language_of=None,
        )
        return router(prompts)

    def translations(
        self, prompts: Sequence[Prompt], requests: Sequence[Mapping[str, Any]], teacher: str
    ) -> list[str | None]:
        """Returns what a teacher answers to the requests in English, in the language of each request."""
        asked = [
            dataclasses.replace(
                prompt, id=f"{prompt.id}-english", prompt=row["english"], language=lexicon.SHARED
            )
            for prompt, row in zip(prompts, requests, strict=True)
        ]
        texts = _chosen_texts(self.route("single", asked, teacher=teacher, rewarded=False))
        return [
            text
            if text is None or prompt.language == lexicon.SHARED
            else lexicon.translated(
                text, prompt.language, loss=TRANSLATION_LOSS, key=(self._seed, prompt.id)
            )
            for text, prompt in zip(texts, prompts, strict=True)
        ]


def _chosen_texts(routed: Any) -> list[str | None]:
    return [
        None if name is None else answers[name]["text"]
        for name, answers in zip(routed.chosen, routed.answers, strict=True)
    ]


def _sft(requests: Sequence[Mapping[str, Any]], texts: Sequence[str | None]) -> Rows:
    pairs = zip(requests, texts, strict=True)
    return [answered(row, text) for row, text in pairs if text is not None]


def _write_clusters(
    requests: Sequence[Mapping[str, Any]],
    texts: Mapping[str, Sequence[str | None]],
    to: pathlib.Path,
    seed: int,
) -> None:
    """Writes the data of the clusters' experts and of a polish, and of an expert whose answers are those of other requests."""
    rows = _sft(requests, texts["reward"])
    for name, codes in lexicon.FAMILIES.items():
        own = lexicon.of_languages(rows, (*codes, lexicon.SHARED))
        write(to / f"sft_reward_{name}.jsonl", own)
        tenth = [row for code in codes for row in lexicon.of_languages(rows, [code])[::10]]
        write(to / f"sft_tenth_{name}.jsonl", tenth)
    order = np.random.default_rng(seed).permutation(len(rows))
    shuffled = [answered(row, rows[i]["completion"]) for row, i in zip(rows, order, strict=True)]
    write(to / "sft_harmful.jsonl", shuffled)


def _write_pairs(
    requests: Sequence[Mapping[str, Any]],
    routed: Any,
    native: Sequence[str | None],
    to: pathlib.Path,
) -> None:
    """Writes best against worst answers: all, and as many in English and in all languages; native against translated ones."""
    from espalier.data.aya_expanse import routing

    pairs: Rows = []
    for row, answers, rewards in zip(requests, routed.answers, routed.rewards, strict=True):
        texts = {name: one["text"] for name, one in answers.items()}
        if (names := routing.pair(rewards, texts)) is not None:
            pairs.append(_pair(row, texts[names[0]], texts[names[1]]))
    write(to / "pairs.jsonl", pairs)
    of_languages = {n: lexicon.of_languages(pairs, codes) for n, codes in PAIR_LANGUAGES.items()}
    count = min(map(len, of_languages.values()))
    for number, some in of_languages.items():
        chosen = [some[i] for i in np.linspace(0, len(some) - 1, count).round().astype(int)]
        write(to / f"pairs_{number}.jsonl", chosen)
    translated = []
    for row, text in zip(requests, native, strict=True):
        if text is not None and row["language"] != lexicon.SHARED:
            worse = lexicon.lossy(text, row["language"], loss=TRANSLATION_LOSS, key=row["id"])
            if worse != text:
                translated.append(_pair(row, text, worse))
    write(to / "pairs_native.jsonl", translated)


def _pair(row: Mapping[str, Any], chosen: str, rejected: str) -> dict[str, str]:
    request = {key: row[key] for key in ("id", "prompt", "language")}
    return {**request, "chosen": chosen, "rejected": rejected}


def _qualities(
    requests: Sequence[Mapping[str, Any]],
    routed: Any,
    texts: Mapping[str, Sequence[str | None]],
    seed: int,
) -> dict[str, Any]:
    """Returns mean exact scores of answers: of teachers, of routings by language, and by the reward's noise."""

    def exact(row: Mapping[str, Any], text: str | None) -> float:
        return 0.0 if text is None else lexicon.score(text, row["answer"], row["language"])

    scores = [
        {name: exact(row, one["text"]) for name, one in answers.items()}
        for row, answers in zip(requests, routed.answers, strict=True)
    ]
    languages = [row["language"] for row in requests]
    by_noise = {}
    for noise in NOISES:
        chosen = [
            max(
                answers,
                key=lambda name, row=row, answers=answers: lexicon.noisy_score(
                    answers[name]["text"], row, deviation=noise, seed=seed
                ),
            )
            if answers
            else None
            for row, answers in zip(requests, routed.answers, strict=True)
        ]
        by_noise[str(noise)] = _mean(
            0.0 if name is None else one[name] for name, one in zip(chosen, scores, strict=True)
        )
    return {
        "teachers": {
            name: _by_language(languages, [one.get(name, 0.0) for one in scores])
            for name in routed.names
        },
        "routings": {
            name: _by_language(
                languages, [exact(row, text) for row, text in zip(requests, some, strict=True)]
            )
            for name, some in texts.items()
        },
        "by_noise": by_noise,
        "uniform": _mean(np.mean(list(one.values())) if one else 0.0 for one in scores),
    }


def _by_language(languages: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    return {
        code: float(np.mean([v for v, one in zip(values, languages, strict=True) if one == code]))
        for code in lexicon.LANGUAGES
    }
