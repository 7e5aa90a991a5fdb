"""Predictions of the teachers of a pool for the answers that they wrote, which a student learns beside the answers.

The rows are those of `sft.jsonl` of `espalier prepare arbitrage`, which name the teacher of each answer. Before training, each
teacher reads its own answers once, after the prompt as it was asked, and its K largest log-probabilities at each token are
stored. `data.distillation.alignment` carries them to the student's tokens. A student of the teacher's vocabulary gets them
unchanged, as from `launch.distillation.teacher.StoredTeacher`.

Example: t5x_configs/methods/distillation/distillation_pool.gin.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from espalier.common.ranges import Positive, Size
from espalier.data import tasks
from espalier.data.aya_expanse import pool as pools
from espalier.data.aya_expanse.prompts import UNKNOWN, Prompt
from espalier.data.cache import cache_dir
from espalier.data.cache import store as cache
from espalier.data.chats.tasks import ChatFiles
from espalier.data.distillation import alignment, taught_stream
from espalier.data.distillation.taught_stream import TaughtStream
from espalier.data.stream import rows as stream_rows
from espalier.data.stream.predictions import PredictionStore
from espalier.data.stream.row_stream import EvalStream
from espalier.data.text.documents import DataError
from espalier.launch.aya_expanse import teachers
from espalier.launch.aya_expanse.teachers import CheckpointTeacher, SamplingFlags
from espalier.launch.distillation.teacher import missing_rows, predictions_of
from espalier.launch.inference.generate import prompt_of
from espalier.launch.load.load_run import LoadedRun, LoadError
from espalier.launch.predictions import StoredValues
from espalier.trainers.distillation.objective import ABSENT_LOG_PROB
from espalier.trainers.scoring.scoring import Batched, Row, check_lengths, scored_columns

_VERSION = 1  # raise it when the same rows and teachers give other values
_ROWS_AT_ONCE = 256  # per write to the store
_MACRO = "TEACHER_POOL"
_COLUMNS = ("teacher", "key", "settings")  # which arbitrage writes into each row


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Answer:
    """A row of the data and its answer, the last one, in the student's tokens.

    Attributes:
      where, row: place and content; see `data.aya_expanse.outputs.sft_row`.
      length: tokens of the whole row that the student reads or predicts, a start token among them.
      begin: place of the answer in these.
      ids: tokens of the answer, with those that end the turn.
    """

    where: str
    row: Mapping[str, Any]
    length: int
    begin: int
    ids: Sequence[int]

    @property
    def text(self) -> str:
        messages = self.row.get("messages")
        return messages[-1]["content"] if messages else self.row["completion"]

    def prompts(self) -> Iterator[Prompt]:
        """Yields the prompt as text, if it can be one, and as messages: arbitrage writes both as messages."""
        before: Any = self.row["messages"][:-1] if "messages" in self.row else self.row["prompt"]
        forms = [before]
        if not isinstance(before, str) and [one["role"] for one in before] == ["user"]:
            forms.insert(0, before[0]["content"])
        for prompt in forms:
            about = {"columns": {}, "where": self.where, "language": UNKNOWN}
            yield Prompt(id="", prompt=prompt, **about)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class StoredPool(StoredValues):
    """The teachers of a pool, whose predictions for their own answers are computed before training.

    Attributes:
      pool: the YAML file of the teachers, see data/aya_expanse/pool.py.
      student: the model in training.
      vocabulary: the student's.
      top_k: tokens stored per position.
      temperature: temperature of the stored log-probabilities; must be the objective's.
    """

    pool: str
    student: Any
    vocabulary: Any
    top_k: Size
    temperature: Positive = 1.0

    def check(self, meta: Mapping[str, Any] | None = None) -> None:
        """Raises DataError for a malformed pool, and ValueError for a student that cannot learn from one."""
        del meta
        pools.read(self.pool)
        if self.student.row.encodes:
            raise ValueError(
                f"{_MACRO}: the student is a {type(self.student).__name__}, and only a decoder learns from a pool: change MODEL."
            )
        if not 1 <= self.top_k < (size := self.student.config.vocab_size):
            raise ValueError(f"TEACHER_TOP_K = {self.top_k} must lie in [1, {size - 1}].")

    def read(self, stream: Any, *, steps: int | None) -> TaughtStream:
        """Returns a stream of conversations with their teachers' predictions; see `StoredValues.read`.

        Raises:
          DataError, LoadError and others: a row whose teacher gives no log-probabilities, or did not write it.
        """
        length = stream.targets_length
        answers = self._answers(stream)
        size = self.student.config.vocab_size
        settings = [_VERSION, self.top_k, self.temperature, length, size]
        written = sorted(str(one.row["key"]) for one in answers.values())
        key = cache.digest([*settings, stream.summary()["vocabulary"]["digest"], written])
        store = PredictionStore.shared(
            key,
            {"top_k": self.top_k, "temperature": self.temperature},
            root=cache_dir.cache_dir(taught_stream.FOLDER) if self.store is None else self.store,
            shape=taught_stream.shape_of(length, self.top_k),
            setting=_MACRO,
        )
        steps = stream.num_steps if steps is None else steps
        missing = {
            digest: list(_segments(row)) for digest, row in missing_rows(stream, store, steps)
        }
        if missing:
            keys = dict.fromkeys(key for segments in missing.values() for _, key in segments)
            values = self._values({key: answers[key] for key in keys})
            for first in range(0, len(missing), _ROWS_AT_ONCE):
                digests = list(missing)[first : first + _ROWS_AT_ONCE]
                made = np.stack([self._nothing(length)] * len(digests))
                for row_TN, digest in zip(made, digests, strict=True):
                    for place_T, key in missing[digest]:
                        row_TN[place_T] = values[key]
                store.add(digests, made)
        taught = TaughtStream(stream, store, top_k=self.top_k, teacher=key)
        _report(taught, steps, held_out=isinstance(stream, EvalStream))
        return taught

    def _answers(self, stream: Any) -> dict[bytes, _Answer]:
        """Returns the answers of a stream's tasks by the tokens that are read of their rows; of equal rows, the first."""
        answers: dict[bytes, _Answer] = {}
        start = stream.summary()["start_token"]  # None if the rows have none, or BOS
        for name in stream.source_names:
            source = tasks.sources().get(name)
            if not isinstance(source, ChatFiles):
                raise ValueError(
                    f"{_MACRO}: the task {name!r} does not read the sft.jsonl of espalier prepare arbitrage: give it as CHATS, with "
                    "data/chat.gin and runs/finetune.gin."
                )
            for where, row, ids, learnt in source.tokenised_rows():
                if lacking := [column for column in _COLUMNS if column not in row]:
                    raise DataError(
                        f"{where}: no {lacking[0]!r}. {_MACRO} reads rows as espalier prepare arbitrage writes them: give its sft.jsonl "
                        "as CHATS, without CHATS_COLUMNS"
                    )
                length = min(len(ids), stream.targets_length)
                if start is not None:
                    ids, learnt, length = [start, *ids], [False, *learnt], length + 1
                answer = self._answer(where, row, ids, learnt, length)
                answers.setdefault(_key(ids[: length - 1]), answer)
        return answers

    @staticmethod
    def _answer(
        where: str, row: Any, ids: Sequence[int], learnt: Sequence[bool], length: int
    ) -> _Answer:
        stop = max(i for i, is_learnt in enumerate(learnt) if is_learnt) + 1
        begin = stop
        while begin and learnt[begin - 1]:
            begin -= 1
        return _Answer(where=where, row=row, length=length, begin=begin, ids=ids[begin:stop])

    def _values(self, answers: Mapping[bytes, _Answer]) -> dict[bytes, np.ndarray]:
        """Returns the values of each row, [its length - 1, 2 K + 1], from one teacher after the other."""
        if jax.process_count() > 1:
            raise ValueError(
                f"{_MACRO}: predictions are computed in one process: start the run once in one, with a TEACHER_STORE that all read."
            )
        pool = pools.read(self.pool)
        by_teacher: dict[str, dict[bytes, tuple[_Answer, Prompt]]] = {}
        working: dict[Any, CheckpointTeacher] = {}
        for key, answer in answers.items():
            name = str(answer.row["teacher"])
            settings = repr(answer.row["settings"])
            if (name, settings) not in working:
                working[name, settings] = _at_work(pool, name, answer)
            prompt = _prompt(working[name, settings], answer)
            by_teacher.setdefault(name, {})[key] = answer, prompt
        teacher_of = {name: one for (name, _), one in working.items()}
        values: dict[bytes, np.ndarray] = {}
        for name, rows in by_teacher.items():
            with teacher_of[name].loaded() as run:
                own = self._of_teacher(run, teacher_of[name].teacher, list(rows.values()))
                values.update((list(rows)[i], values_TN) for i, values_TN in own)
        return values

    def _of_teacher(
        self, run: LoadedRun, teacher: pools.Teacher, rows: Sequence[tuple[_Answer, Prompt]]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (index of a row, its values), as they finish."""
        if run.encodes or run.vocabulary_or_none is None:
            what = "is an encoder-decoder" if run.encodes else "has no tokenizer beside its model"
            raise LoadError(
                f"{self.pool}: the teacher {teacher.name!r} {what}, and its predictions cannot be carried to the student's tokens: "
                "leave its rows out, or give a run of a decoder with its vocabulary."
            )
        digest = stream_rows.vocabulary_digest
        size, student_size = run.model.config.vocab_size, self.student.config.vocab_size
        same_V = None
        if digest(run.vocabulary) == digest(self.vocabulary):
            size = min(size, student_size)
        else:
            same_V = alignment.same_texts(run.vocabulary, self.vocabulary, size)
        if self.top_k >= size:
            raise ValueError(
                f"TEACHER_TOP_K = {self.top_k} must be below {size}, the ids of the teacher {teacher.name!r}."
            )
        scored = []
        for answer, prompt in rows:
            context = prompt_of(run, teachers.row_of(run, prompt), answer.where)
            ids = run.encode(answer.text, answer.where, as_text=True)
            # The last token is only predicted: what follows the answer, whose prediction is not stored.
            scored.append(Row(context=context, targets=[*ids, 0]))
        function = functools.partial(
            predictions_of, run.model, ids=size, top_k=self.top_k, temperature=self.temperature
        )
        read = Batched(
            function,
            scored_columns,
            run.model,
            batch_size=run.batch_size(teacher.batch_size, len(scored)),
            sharding=run.row_sharding,
        )
        lengths = [row.inputs for row in scored]
        check_lengths(lengths, read.limit)
        for i, values_TN in read(run.params, scored, lengths, title=teacher.name):
            ids = list(scored[i].targets)[:-1]
            own_TN = values_TN[len(scored[i].context) - 1 :][: len(ids) + 1]
            yield i, self._carried(run, rows[i][0], ids, own_TN, same_V)

    def _carried(
        self,
        run: LoadedRun,
        answer: _Answer,
        ids: Sequence[int],
        own_TN: np.ndarray,
        same_V: np.ndarray | None,
    ) -> np.ndarray:
        """Returns the values at the student's tokens of a row, from those at the teacher's tokens of its answer."""
        if same_V is None and list(answer.ids[: len(ids)]) == list(ids):
            places = {place: place for place in range(len(ids) + 1)}
        else:
            places = alignment.matches(
                alignment.places_of(run.vocabulary, ids),
                alignment.places_of(self.vocabulary, answer.ids),
            )
        places = {place: theirs for place, theirs in places.items() if place < len(answer.ids)}
        if same_V is not None:
            same_V = same_V.copy()
            for place, theirs in places.items():
                if theirs == len(ids):  # what ends the turn
                    same_V[list(run.eos_ids)] = answer.ids[place]
            own_TN = alignment.carried(own_TN, same_V, absent=ABSENT_LOG_PROB)
        values_TN = self._nothing(answer.length - 1)
        for place, theirs in places.items():
            if 1 <= (target := answer.begin + place) < answer.length:
                values_TN[target - 1] = own_TN[theirs]
        return values_TN

    def _nothing(self, length: int) -> np.ndarray:
        return alignment.nothing(length, self.top_k, absent=ABSENT_LOG_PROB)


def _at_work(pool: pools.Pool, name: str, answer: _Answer) -> CheckpointTeacher:
    """Returns the teacher of an answer; raises DataError if it is not in the pool, or gives no log-probabilities."""
    teacher = pool.teachers.get(name)
    if teacher is None or teacher.kind == "url":
        what = "is not in the pool" if teacher is None else "is an endpoint"
        raise DataError(
            f"{answer.where}: the teacher {name!r} {what}, and gives no log-probabilities. Give {_MACRO} a pool in which it is a "
            "checkpoint, or leave its rows out"
        )
    try:
        sampling = SamplingFlags(**answer.row["settings"])
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{answer.where}: 'settings' are no settings of sampling: {error}"
        ) from None
    return CheckpointTeacher(teacher, sampling.of(teacher))


def _prompt(working: CheckpointTeacher, answer: _Answer) -> Prompt:
    """Returns the prompt that a teacher was asked; raises DataError if the teacher, as it is now, did not write the answer."""
    for prompt in answer.prompts():
        if teachers.key_of(working, prompt) == answer.row["key"]:
            return prompt
    imported = ", or run espalier prepare arbitrage again, whose earlier versions imported it"
    raise DataError(
        f"{answer.where}: the teacher {working.teacher.name!r} of {_MACRO} did not write this answer to this prompt: its path, weights, "
        "chat template or settings are others, or the answer is a fusion or a translation. Give the pool of the arbitrage, unchanged"
        + (imported if working.teacher.kind == "hf" else "")
    )


def _segments(row: Mapping[str, np.ndarray]) -> Iterator[tuple[np.ndarray, bytes]]:
    """Yields for each conversation of a row of the stream its places in the row, and its key."""
    segment_T = row["decoder_segment_ids"]
    for segment in range(1, int(segment_T.max()) + 1):
        place_T = np.flatnonzero(segment_T == segment)
        yield place_T, _key(row["decoder_input_tokens"][place_T])


def _key(ids: Any) -> bytes:
    return np.asarray(ids, np.int32).tobytes()


def _report(taught: TaughtStream, steps: int, *, held_out: bool) -> None:
    """Prints the share of the learnt tokens that have predictions; raises ValueError if none in training has."""
    learnt, with_prediction, seen = 0, 0, set()
    for step in range(steps):
        batch = taught.batch(step, 0, taught.batch_size)
        for b, digest in enumerate(taught_stream.row_digests(batch)):
            if digest not in seen:
                seen.add(digest)
                is_learnt_T = batch["decoder_loss_weights"][b] > 0
                learnt += int(is_learnt_T.sum())
                with_prediction += int((batch["teacher_ids"][b, :, 0] >= 0)[is_learnt_T].sum())
    if not with_prediction and not held_out:
        raise ValueError(
            f"{_MACRO}: none of the {learnt:,} learnt tokens has a prediction: the student's chat template changes the texts of answers, "
            "or no token of its vocabulary has the text of a teacher's. Give another CHAT_TEMPLATE, or fine-tune without a pool."
        )
    if jax.process_index() == 0:
        print(
            f"{_MACRO}: {with_prediction / learnt:.1%} of {learnt:,} {'held-out' if held_out else 'learnt'} tokens in {len(seen):,} rows have predictions of their "
            "teacher; the others are learnt from the data only",
            file=sys.stderr,
        )
