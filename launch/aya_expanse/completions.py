"""Completions of prompts by teachers: each is written on arrival with its provenance, and none is requested twice."""

import collections
import contextlib
import dataclasses
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from espalier.common.bars import Bar
from espalier.data.aya_expanse.pool import Teacher
from espalier.data.aya_expanse.prompts import Prompt
from espalier.data.text.documents import DataError
from espalier.launch import input_errors
from espalier.launch.aya_expanse.teachers import Working, key_of
from espalier.launch.inference.chat_endpoint import ChatReply, Silence
from espalier.launch.inference.row_files import ResumedRows


class Store(ResumedRows):
    """The completions of a file by their keys. Several threads may use it.

    Raises:
      DataError: a line is not a completion.
    """

    def __init__(self, *file: Any, **options: Any):
        super().__init__(*file, **options)
        self._lock = threading.Lock()
        self._rows: dict[str, Mapping[str, Any]] = {}
        self._earlier: set[str] = set()
        for place, row in self.rows:
            if "error" in row:  # for readers of the file; it is requested again
                continue
            if not isinstance(row.get("key"), str) or not isinstance(row.get("text"), str):
                raise DataError(f"{place} is not a completion. Delete the line to request it again")
            self._rows[row["key"]] = row
            self._earlier.add(row["key"])

    def is_earlier(self, key: str) -> bool:
        """Returns whether the completion of a key is of an earlier start."""
        return key in self._earlier

    def get(self, key: str) -> Mapping[str, Any] | None:
        """Returns the completion of a key, or None."""
        return self._rows.get(key)

    def add(self, row: Mapping[str, Any]) -> None:
        """Writes a completion, or the row of one that did not come, with "error"."""
        with self._lock:
            super().add(row)
            if "error" not in row:
                self._rows[row["key"]] = row


@dataclasses.dataclass(kw_only=True)
class Asked:
    """What became of the requests to one teacher.

    Attributes:
      new: completions of this start.
      silent: requests of this start without a completion, by reason.
      failed: why the teacher is not asked further; empty if it works.
    """

    new: int = 0
    silent: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    failed: str = ""


def ask(
    working: Mapping[str, Working],
    wanted: Mapping[str, Sequence[Prompt]],
    store: Store,
    *,
    attempts: int,
    asked: Mapping[str, Asked],
) -> None:
    """Requests the completions that the store lacks: of all endpoints at once, and of one local teacher at a time.

    A teacher that fails is not asked further, and the others go on.

    Args:
      working: teachers by name.
      wanted: the prompts of each teacher.
      attempts: maximum requests of a completion in this start.
      asked: counts of each teacher, which are updated.
    """
    # By key, since prompts of different ids may have the same text.
    by_key = {
        name: {key_of(working[name], prompt): prompt for prompt in prompts}
        for name, prompts in wanted.items()
    }
    missing = {
        name: [prompt for key, prompt in prompts.items() if store.get(key) is None]
        for name, prompts in by_key.items()
    }
    missing = {name: prompts for name, prompts in missing.items() if prompts}
    local = [name for name in missing if working[name].local]
    remote = [name for name in missing if not working[name].local]
    total = sum(map(len, missing.values()))
    with Bar(total=total, desc="teachers", unit="completion") as progress:

        def one(name: str) -> None:
            _ask_one(working[name], missing[name], store, attempts, asked[name], progress)

        with ThreadPoolExecutor(max(len(remote), 1)) as threads:
            try:
                futures = [threads.submit(one, name) for name in remote]
                for name in local:
                    one(name)
                for future in futures:
                    future.result()
            except BaseException:  # nobody waits for the endpoints any more
                for name in remote:
                    working[name].close()
                raise


def _ask_one(
    working: Working,
    prompts: Sequence[Prompt],
    store: Store,
    attempts: int,
    asked: Asked,
    progress: Any,
) -> None:
    left = list(prompts)
    try:
        for _ in range(attempts):
            silent = []
            with contextlib.closing(working.answers(left)) as answers:  # type: ignore[type-var]
                for i, answer in answers:
                    key = key_of(working, left[i])
                    store.add(_row(working, left[i], answer, key))
                    if isinstance(answer, Silence):
                        silent.append(left[i])
                        asked.silent[answer.reason] += 1
                    else:
                        asked.new += 1
                        progress.update()
            left = silent
            if not left or working.local:  # a checkpoint would refuse a prompt again
                break
    except Exception as error:
        if (reason := input_errors.reason(error)) is None:
            raise
        asked.failed = str(reason)
        Bar.write(f"warning: {working.teacher.name} failed: {reason}", file=sys.stderr)


def _row(working: Working, prompt: Prompt, answer: ChatReply | Silence, key: str) -> dict[str, Any]:
    teacher: Teacher = working.teacher
    about = {
        "key": key,
        "id": prompt.id,
        "language": prompt.language,
        "teacher": teacher.name,
        "source": teacher.model or teacher.where,
        "settings": dataclasses.asdict(working.sampling),
    }
    if isinstance(answer, Silence):
        return {**about, "error": answer.reason}
    cost = teacher.cost(answer.prompt_tokens, answer.new_tokens)
    return {**about, **dataclasses.asdict(answer), "cost": cost}
