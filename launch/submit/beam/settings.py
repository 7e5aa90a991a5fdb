"""What work on a whole corpus with Apache Beam needs, starts and costs, whichever cluster runs it (dataflow.py, flink.py)."""

import abc
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import ClassVar

from espalier.launch.submit.base import Job, SubmitError
from espalier.launch.submit.launch_config import Launch

FLAG = "--beam_pipeline_options"
CACHES = "ESPALIER_CACHE"
# Commands that take the flag: the first words, and whether a process of a worker uses all its cores.
COMMANDS: Mapping[str, bool] = {
    "prepare cache": False,
    "prepare documents": False,
    "prepare vocabulary": False,
    "score": True,
    "influence score": True,
}
# Tokens a second of one core, rounded down: 62 MB of Python sources, byte-level BPE of 32k, one core of an AMD EPYC, November
# 2026. Other commands depend on their filters and models.
MEASURED = {"prepare cache": 500_000}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beam(Launch):
    """Apache Beam: workers, and an estimate of what they cost.

    Attributes:
      workers: machines or pods.
      tokens: of the corpus, for the estimate; 0 for no estimate.
      tokens_per_second: of one core, for the estimate; 0 for the measured rate of `prepare cache`.
      price_per_core_hour: what you pay, in any currency, for the estimate; 0 if unknown.
    """

    # A path that the workers do not see is an error: they would all fail on it.
    SHARED_PATHS: ClassVar[bool] = True

    workers: int = 10
    tokens: int = 0
    tokens_per_second: int = 0
    price_per_core_hour: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "workers")
        self.at_least(0, "tokens", "tokens_per_second")
        if self.price_per_core_hour < 0:
            raise SubmitError(f"price_per_core_hour = {self.price_per_core_hour} is negative.")
        for name in ("tokens_per_second", "price_per_core_hour"):
            if getattr(self, name) and not self.tokens:
                raise SubmitError(
                    f"{name} is for the estimate: add --config.tokens=N, the tokens of the corpus, or remove it."
                )

    @property
    @abc.abstractmethod
    def cores_of_worker(self) -> int: ...

    def notes(self) -> list[str]:
        return []  # see `costs`

    def check(self, words: Sequence[str]) -> None:
        command = command_of(words)
        given = {word.partition("=")[0] for word in words}
        if FLAG in given:
            raise SubmitError(f"{FLAG}: the launch configuration gives it; remove the flag.")
        if "--workers" in given:
            raise SubmitError("--workers: a pipeline has config.workers; remove the flag.")
        if self.tokens and not (self.tokens_per_second or command in MEASURED):
            raise SubmitError(
                f"tokens = {self.tokens}: how fast {command} is depends on what it reads: measure a small part on one core, and "
                "give --config.tokens_per_second=N."
            )
        if command == "prepare cache":
            self._check_caches()

    def _check_caches(self) -> None:
        """Raises SubmitError if the workers would not write into one and the same folder of caches."""
        place = self.variables.get(CACHES, "")
        if not place:
            raise SubmitError(
                f"env: {CACHES} is missing, so that every worker would have caches of its own: give the address of one for all, "
                f"--config.env=\"('{CACHES}=gs://BUCKET/cache',)\"."
            )
        if "://" not in place and (reason := self.unseen(os.path.join(self.directory, place))):
            raise SubmitError(f"env: {CACHES} = {place!r}: {reason}.")

    def processes_of_worker(self, words: Sequence[str]) -> int:
        """Returns how many elements a worker has at a time: one for each core, or one that uses all cores."""
        return 1 if COMMANDS[command_of(words)] else self.cores_of_worker

    def costs(self, words: Sequence[str]) -> list[str]:
        """Returns lines on the work of a command, as far as the settings tell."""
        if not self.tokens:
            return [
                "Estimate: none. Give --config.tokens=N, the tokens of the corpus, and --config.price_per_core_hour=X for money."
            ]
        command, cores = command_of(words), self.workers * self.cores_of_worker
        rate = self.tokens_per_second or MEASURED[command]
        whose = "yours" if self.tokens_per_second else "measured here; measure yours, and give it"
        hours = self.tokens / rate / 3600
        lines = [
            f"Estimate: {self.tokens:,} tokens at {rate:,} a second for each core (tokens_per_second, {whose}) are {hours:,.1f} core "
            f"hours: {hours / cores:,.2f} hours of {cores:,} cores, if all are busy.",
            "Not in it: the time in which machines start and wait for the last shards, shuffles, disks, requests and traffic.",
        ]
        if self.price_per_core_hour:
            lines.append(
                f"Cost: {hours * self.price_per_core_hour:,.2f}, in the currency of your price_per_core_hour = "
                f"{self.price_per_core_hour}."
            )
        return lines


def command_of(words: Sequence[str]) -> str:
    """Returns the command that words begin with; raises SubmitError if Apache Beam does not run it."""
    for name in COMMANDS:
        own = name.split()
        if list(words[: len(own)]) == own:
            return name
    given = next((word for word in words if not word.startswith("-")), "")
    raise SubmitError(
        f"{given}: Apache Beam runs {', '.join(COMMANDS)}, given after --; choose another --config for other commands."
    )


def words_of(job: Job) -> list[str]:
    """Returns the words of a job from the name of this project's command on."""
    return [job.command[2].removeprefix("espalier.launch."), *job.command[3:]]


def addresses(settings: Launch, words: Sequence[str]) -> list[str]:
    """Returns the addresses in the words of a command and in its variables, once each."""
    values = [value for _, _, value in (word.rpartition("=") for word in words)]
    found = [value.strip("'\"") for value in (*values, *settings.variables.values())]
    return list(dict.fromkeys(value for value in found if "://" in value))


def flag(**options: object) -> str:
    """Returns the flag with the options of a pipeline, without options that are ''; options that are True have no value."""
    texts = [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in options.items()
        if value != ""
    ]
    return f"{FLAG}={','.join(texts)}"


def comment(lines: Sequence[str]) -> str:
    """Returns lines as comments of a script or of YAML."""
    return "".join(f"# {line}\n" for line in lines)
