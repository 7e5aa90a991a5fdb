"""Every reply of a judge, kept as soon as it comes: a JSON line each, found again by its question.

A process can end at any time: a last line that was cut short is dropped, and asked for again.
"""

import contextlib
import fcntl
import json
import os
import pathlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from launch.evaluation.judges.base import JudgeError, Question, Reply


class Journal:
    """Replies by the keys of their questions; `opened` makes one."""

    def __init__(self, path: pathlib.Path, file: Any):
        self._path = path
        self._file = file
        self._replies: dict[str, list[Reply]] = defaultdict(list)
        self._read()

    def replies(self, key: str) -> list[Reply]:
        """What the judge said to a question, attempt by attempt."""
        return self._replies.get(key, [])

    def add(self, key: str, question: Question, reply: Reply, *, judge: str) -> None:
        """Keeps a reply. One that did not come is kept for people alone."""
        record = {"key": key, "judge": judge, **question.about, "value": reply.value}
        record |= {"text": reply.text} if reply.text else {}
        if reply.error:
            record["error"] = reply.error
        else:
            self._replies[key].append(reply)
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def _read(self) -> None:
        whole = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                record = json.loads(line)
                key, value, text = record["key"], record["value"], record.get("text", "")
            except (ValueError, KeyError, TypeError):
                raise JudgeError(
                    f"{self._path}, line {number}: not a kept reply. Delete the line, and it is asked "
                    "for again."
                ) from None
            if "error" not in record:
                self._replies[key].append(Reply(value=value, text=text))
        self._file.truncate(whole)
        self._file.seek(whole)


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[Journal]:
    """The journal in a file, which is this process's until it is left.

    Raises:
      JudgeError: another process writes it, or a line in it is damaged.
    """
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JudgeError(
                f"Another process is judging into {path.parent}: wait for it, or give another --out."
            ) from None
        except OSError:  # a file system without locks
            pass
        yield Journal(path, file)
