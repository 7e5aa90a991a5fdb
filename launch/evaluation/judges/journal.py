"""The file of a judge's replies: one JSON line per reply, written on arrival and looked up by its question."""

import contextlib
import pathlib
from collections import defaultdict
from collections.abc import Iterator

from launch.evaluation.judges.base import JudgeError, Question, Reply
from launch.inference import row_files
from launch.inference.row_files import ResumedRows


class Journal:
    """Replies by the keys of their questions; opened by `opened`."""

    def __init__(self, file: ResumedRows):
        self._file = file
        self._replies: dict[str, list[Reply]] = defaultdict(list)
        for place, record in file.rows:
            if not {"key", "value"} <= record.keys():
                raise JudgeError(
                    f"{place}: not a judge's reply. Delete the line, and the question is asked again."
                )
            if "error" not in record:
                reply = Reply(value=record["value"], text=record.get("text", ""))
                self._replies[record["key"]].append(reply)

    def replies(self, key: str) -> list[Reply]:
        """Returns the judge's replies to a question, by attempt."""
        return self._replies.get(key, [])

    def add(self, key: str, question: Question, reply: Reply, *, judge: str) -> None:
        """Writes a reply. The record of a missing reply is only for readers of the file."""
        record = {"key": key, "judge": judge, **question.about, "value": reply.value}
        record |= {"text": reply.text} if reply.text else {}
        if reply.error:
            record["error"] = reply.error
        else:
            self._replies[key].append(reply)
        self._file.add(record)


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[Journal]:
    """Opens the journal in a file and locks it against other processes.

    Raises:
      JudgeError: a line is not a judge's reply.
      RowFileError: another process writes the file, or a line is damaged.
    """
    with row_files.resumed(path) as file:
        yield Journal(file)
