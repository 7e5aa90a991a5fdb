"""Routing: whom to ask, which answers can be used, and whose answer is kept."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.data.aya_expanse import router, routing, second_prompts
from espalier.data.aya_expanse.pool import Pool
from espalier.data.aya_expanse.prompts import UNKNOWN, Prompt, same_language
from espalier.data.languages import table
from espalier.data.rows.records import is_blank
from espalier.data.text.documents import DataError
from espalier.launch.aya_expanse.completions import Asked, Store, ask
from espalier.launch.aya_expanse.teachers import SamplingFlags, Working, at_work, key_of

NO_ANSWER, EMPTY, CUT, WRONG_LANGUAGE = "no answer", "empty", "cut", "wrong language"
ROUTER = "router.npz"


@dataclasses.dataclass(kw_only=True)
class Routed:
    """The result for P prompts.

    Attributes:
      names: all teachers.
      all_answers: all answers, by teacher.
      answers: the answers that can be used, by teacher, in the order of the pool.
      fates: why an answer cannot be used, by teacher.
      rewards: of `answers`, by teacher.
      chosen: the teacher of each prompt; None if it has no answer that can be used.
      reward_version: see `Rewards.version`; None without a reward.
      teachers: counts of requests by teacher, as JSON.
    """

    names: Sequence[str]
    all_answers: list[dict[str, Any]]
    answers: list[dict[str, Any]]
    fates: list[dict[str, str]]
    rewards: Sequence[Mapping[str, float]] = ()
    chosen: Sequence[str | None] = ()
    reward_version: str | None = None
    teachers: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


class Router:
    """Asks the teachers of a pool, and chooses among their answers.

    Args:
      settings: `launch.aya_expanse.arbitrage.ArbitrageFlags`.
      store: answers of earlier starts, and of this one.
      rewards: `launch.aya_expanse.arbitrage_rewards.Rewards`; None for no rewards.
      language_of: see `launch.aya_expanse.arbitrage.arbitrage`.
    """

    def __init__(
        self,
        settings: Any,
        pool: Pool,
        store: Store,
        *,
        sampling: SamplingFlags,
        rewards: Any | None,
        language_of: Callable[[str], str | None] | None,
    ):
        self._settings, self._pool, self._store = settings, pool, store
        self._sampling, self._rewards, self._language_of = sampling, rewards, language_of
        self._out = pathlib.Path(settings.out)
        self._asked = {name: Asked() for name in pool.teachers}
        self._working: dict[str, Working] = {}

    def __call__(self, prompts: Sequence[Prompt]) -> Routed:
        """Returns the answers to the prompts, and whose is kept.

        Raises:
          DataError: a prompt that the routing has no teacher for.
          EndpointError, LoadError, FileNotFoundError and others: a teacher that cannot be used.
        """
        settings, pool = self._settings, self._pool
        if settings.routing == "fusion":
            return self._fused(prompts)
        if settings.routing == "translated":
            return self._translated(prompts)
        planned: list[list[str]]
        if settings.routing in ("reward", "learned"):
            planned = [[t.name for t in routing.able(pool, p.language)] for p in prompts]
        else:
            planned = [[self._planned(prompt)] for prompt in prompts]
        self._begin({name for names in planned for name in names})
        learns = [True] * len(prompts)
        if settings.router is not None:
            planned = self._picked(self._loaded(settings.router), prompts, planned)
        elif settings.routing == "learned":
            learns = self._subset(prompts)
            pairs = zip(planned, learns, strict=True)
            self._ask(prompts, [names if learn else [] for names, learn in pairs])
            subset = [i for i, learn in enumerate(learns) if learn]
            picked = self._learned(prompts, subset, planned)
            planned = [names if learns[i] else picked[i] for i, names in enumerate(planned)]
        self._ask(prompts, planned)
        return self._chosen(prompts, planned, learns)

    def _begin(self, names: set[str]) -> None:
        """Prepares teachers: errors in the pool end the command before anything is requested."""
        for name, teacher in self._pool.teachers.items():
            if name in names:
                self._working[name] = at_work(teacher, self._sampling)

    def _fused(self, prompts: Sequence[Prompt]) -> Routed:
        """Asks all teachers but one, and then that one for an answer out of theirs; without it the best of theirs is kept."""
        fuser = self._second_model("fuser")
        planned = []
        for prompt in prompts:
            able = routing.able(self._pool, prompt.language)
            planned.append([teacher.name for teacher in able if teacher.name != fuser])
            if not planned[-1]:
                raise DataError(
                    f"{prompt.where}: no teacher besides --fuser={fuser} is asked in {prompt.language!r}: add one to the pool"
                )
        routed = self._first_answers(prompts, planned, fuser)
        asked = [
            second_prompts.fusion(prompt, {name: one["text"] for name, one in answers.items()})
            if answers
            else None
            for prompt, answers in zip(prompts, routed.answers, strict=True)
        ]
        self._add_second_answers(routed, prompts, asked, fuser)
        self._reward(prompts, routed)
        routed.chosen = [
            fuser if fuser in answers else routing.best(row) if row else next(iter(answers), None)
            for answers, row in zip(routed.answers, routed.rewards, strict=True)
        ]
        return self._counted(routed)

    def _translated(self, prompts: Sequence[Prompt]) -> Routed:
        """Asks one teacher in English, and another for translations of its answers; English prompts keep the first answer."""
        translator = self._second_model("translator")
        english = [second_prompts.in_english(prompt) for prompt in prompts]
        teacher = self._settings.teacher
        planned = [[routing.single(self._pool, teacher, prompt)] for prompt in english]
        routed = self._first_answers(english, planned, translator)
        asked = [
            second_prompts.translation(prompt, next(iter(answers.values()))["text"])
            if answers and not same_language(prompt.language, "en")
            else None
            for prompt, answers in zip(prompts, routed.answers, strict=True)
        ]
        for answers, one in zip(routed.answers, asked, strict=True):
            if one is not None:
                answers.clear()  # an English answer is none to a prompt in another language
        self._add_second_answers(routed, prompts, asked, translator)
        routed.chosen = [next(iter(answers), None) for answers in routed.answers]
        self._reward(prompts, routed)
        return self._counted(routed)

    def _second_model(self, flag: str) -> str:
        """Returns the model that answers out of others' answers; raises DataError if the pool does not have it."""
        name = getattr(self._settings, flag)
        if name is None or name not in self._pool.teachers:
            names = ", ".join(self._pool.teachers)
            raise DataError(f"--{flag}={name} is not a teacher of the pool: give one of {names}")
        return name

    def _first_answers(
        self, prompts: Sequence[Prompt], planned: Sequence[Sequence[str]], second: str
    ) -> Routed:
        """Asks the planned teachers, before the model `second` is asked."""
        self._begin({second, *(name for names in planned for name in names)})
        self._ask(prompts, planned)
        return self._usable(prompts, planned)

    def _add_second_answers(
        self,
        routed: Routed,
        prompts: Sequence[Prompt],
        asked: Sequence[Prompt | None],
        name: str,
    ) -> None:
        """Asks a second model, and adds its answers; `asked` is what it is asked about each prompt, if anything."""
        some = [one for one in asked if one is not None]
        self._ask(some, [[name]] * len(some))
        for i, (prompt, one) in enumerate(zip(prompts, asked, strict=True)):
            if one is not None:
                answer = self._answers(one, [name]).get(name)
                if answer is not None:
                    routed.all_answers[i][name] = answer
                if why := self._fate(prompt, answer):
                    routed.fates[i][name] = why
                else:
                    routed.answers[i][name] = answer

    def _loaded(self, path: str) -> router.Router:
        """Returns the router in a file; raises DataError if it is not of this pool."""
        trained = router.load(path)
        if trained.names != tuple(self._pool.teachers):
            raise DataError(
                f"--router={path} chooses among {', '.join(trained.names)}, not the pool's "
                f"{', '.join(self._pool.teachers)}: give the router of this pool, or none"
            )
        return trained

    def _subset(self, prompts: Sequence[Prompt]) -> list[bool]:
        """Returns whether all teachers answer a prompt, from which the router learns: at least one of each language."""
        share, seed = self._settings.subset, self._sampling.seed
        learns = [routing.in_subset(prompt, share, seed=seed) for prompt in prompts]
        codes = [table.code_of(prompt.language) for prompt in prompts]
        for code in set(codes):
            own = [i for i, one in enumerate(codes) if one == code]
            learns[own[0]] = learns[own[0]] or not any(learns[i] for i in own)
        return learns

    def _planned(self, prompt: Prompt) -> str:
        """Returns the one teacher to ask, for routings that need no answer."""
        if self._settings.routing == "single":
            return routing.single(self._pool, self._settings.teacher, prompt)
        if self._settings.routing == "random":
            return routing.random(self._pool, prompt, seed=self._sampling.seed)
        return routing.fixed(self._pool, prompt)

    def _ask(self, prompts: Sequence[Prompt], planned: Sequence[Sequence[str]]) -> None:
        """Asks the planned teachers of each prompt, unless their answers are stored."""
        wanted = {
            name: [p for p, names in zip(prompts, planned, strict=True) if name in names]
            for name in self._working
            if not self._asked[name].failed
        }
        attempts = self._settings.attempts
        ask(self._working, wanted, self._store, attempts=attempts, asked=self._asked)

    def _answers(self, prompt: Prompt, names: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        """Returns the stored answers to a prompt by teacher."""
        keys = {name: key_of(self._working[name], prompt) for name in names}
        rows = {name: self._store.get(key) for name, key in keys.items()}
        return {name: row for name, row in rows.items() if row is not None}

    def _fate(self, prompt: Prompt, answer: Mapping[str, Any] | None) -> str:
        """Returns why an answer cannot be used; empty if it can."""
        if answer is None:
            return NO_ANSWER
        if is_blank(answer["text"]):
            return EMPTY
        if answer["ended"] == "length" and not self._settings.keep_cut:
            return CUT
        if self._language_of is not None and prompt.language != UNKNOWN:
            language = self._language_of(answer["text"])
            if language is not None and not same_language(language, prompt.language):
                return WRONG_LANGUAGE
        return ""

    def _usable(self, prompts: Sequence[Prompt], planned: Sequence[Sequence[str]]) -> Routed:
        """Returns the stored answers of the planned teachers, and which of them can be used."""
        routed = Routed(names=list(self._pool.teachers), all_answers=[], answers=[], fates=[])
        for prompt, names in zip(prompts, planned, strict=True):
            answers = self._answers(prompt, names)
            whys = {name: self._fate(prompt, answers.get(name)) for name in names}
            routed.all_answers.append(answers)
            routed.answers.append({name: answers[name] for name, why in whys.items() if not why})
            routed.fates.append({name: why for name, why in whys.items() if why})
        return routed

    def _learned(
        self, prompts: Sequence[Prompt], subset: Sequence[int], planned: Sequence[Sequence[str]]
    ) -> list[list[str]]:
        """Returns, for each prompt, the one teacher that is expected to have the largest reward."""
        assert self._rewards is not None
        learnt = [prompts[i] for i in subset]
        usable = self._usable(learnt, [planned[i] for i in subset])
        rewards = self._rewards(learnt, usable.answers)
        names = list(self._pool.teachers)
        if self._settings.per == "language":
            order = routing.best_by_language(learnt, rewards, names)
            return [order.get(prompt.language, [])[:1] for prompt in prompts]
        rewarded = [i for i, row in enumerate(rewards) if row]
        if not rewarded:
            return [[] for _ in prompts]
        p_NK = router.targets([rewards[i] for i in rewarded], names, tau=self._settings.tau)
        learnt = [learnt[i] for i in rewarded]
        trained = router.fit(_texts(learnt), [p.language for p in learnt], p_NK, names)
        trained.save(self._out / ROUTER)
        return self._picked(trained, prompts, planned)

    def _picked(
        self,
        trained: router.Router,
        prompts: Sequence[Prompt],
        planned: Sequence[Sequence[str]],
    ) -> list[list[str]]:
        """Returns the teacher that a router chooses for each prompt, among those that are asked in its language."""
        names = trained.names
        log_probs_NK = trained.log_probs(_texts(prompts), [p.language for p in prompts])
        able_NK = np.array([[name in own for name in names] for own in planned])
        best_N = np.argmax(np.where(able_NK, log_probs_NK, -np.inf), axis=1)
        return [[names[k]] for k in best_N]

    def _chosen(
        self, prompts: Sequence[Prompt], planned: Sequence[Sequence[str]], learns: Sequence[bool]
    ) -> Routed:
        routed = self._usable(prompts, planned)
        self._reward(prompts, routed)
        by_language: Mapping[str, Sequence[str]] = {}
        if self._settings.per == "language":
            known = [
                row if learn else {} for row, learn in zip(routed.rewards, learns, strict=True)
            ]
            by_language = routing.best_by_language(prompts, known, routed.names)
        chosen: list[str | None] = []
        for prompt, answers, row in zip(prompts, routed.answers, routed.rewards, strict=True):
            if self._settings.per == "language":
                order = by_language.get(prompt.language, ())
                chosen.append(next((name for name in order if name in answers), None))
            elif len(answers) == 1:
                chosen.append(next(iter(answers)))
            else:
                chosen.append(routing.best(row) if row else None)
        routed.chosen = chosen
        return self._counted(routed)

    def _reward(self, prompts: Sequence[Prompt], routed: Routed) -> None:
        if self._rewards is None:
            routed.rewards = [{} for _ in prompts]
        else:
            routed.rewards = self._rewards(prompts, routed.answers)
            routed.reward_version = self._rewards.version

    def _counted(self, routed: Routed) -> Routed:
        """Returns a result with the counts of requests by teacher."""
        earlier = self._store.is_earlier
        routed.teachers = {
            name: {
                "earlier": sum(
                    earlier(row[name]["key"]) for row in routed.all_answers if name in row
                ),
                "new": asked.new,
                "failed": asked.failed,
                "silent": dict(asked.silent.most_common(5)),
                "dropped": _counts([row[name] for row in routed.fates if name in row]),
            }
            for name, asked in self._asked.items()
        }
        return routed


def _texts(prompts: Sequence[Prompt]) -> list[str]:
    return [
        prompt.prompt if isinstance(prompt.prompt, str) else prompt.prompt[-1]["content"]
        for prompt in prompts
    ]


def _counts(values: Sequence[str]) -> dict[str, int]:
    return {value: values.count(value) for value in sorted(set(values))}
