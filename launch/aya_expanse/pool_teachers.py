"""The checkpoints of a pool as teachers that run beside a student, each for the languages that the pool fixes it for.

Example: t5x_configs/methods/distillation/on_policy_pool.gin.
"""

from collections.abc import Mapping

from espalier.data.aya_expanse import pool as pools
from espalier.data.languages import table
from espalier.data.text.documents import DataError
from espalier.launch.load import run_model
from espalier.trainers.distillation.objective import Teacher, Teachers
from espalier.trainers.distillation.on_policy import DEFAULT
from espalier.trainers.objectives.frozen_model import FrozenCheckpoint

_MACRO = "TEACHER_POOL"


def by_language(*, pool: str) -> Mapping[str, int]:
    """Returns language -> index of its teacher, as a pool's 'fixed' has them; the one teacher of a pool of one is for all.

    Raises:
      DataError: the pool is malformed, or has several teachers and no 'fixed'.
    """
    read = pools.read(pool)
    names = _names(read, pool)
    if not read.fixed:
        return {DEFAULT: 0}
    return table.ByLanguage({code: names.index(name) for code, name in read.fixed.items()})


def teachers(*, pool: str, model_dir: str, use_ema: bool = False) -> Teachers:
    """Returns the teachers that a pool's 'fixed' names, in the order of the pool.

    Args:
      pool: the YAML file of the pool.
      model_dir: directory of this run, which records the step of each teacher that it uses.
      use_ema: the moving averages of their parameters.

    Raises:
      DataError: the pool is malformed, has several teachers and no 'fixed', or fixes a teacher that is no run.
      ValueError: a run has no model.json.
    """
    read = pools.read(pool)
    made = []
    for index, name in enumerate(_names(read, pool)):
        teacher = read.teachers[name]
        if teacher.kind != "checkpoint":
            what = "an endpoint, which gives no log-probabilities"
            if teacher.kind == "hf":
                what = "a Hugging Face directory: import it with espalier convert --from_hf"
            raise DataError(
                f"{pool}: the teacher {name!r} is {what}. Name runs in 'fixed', as 'checkpoint'"
            )
        macro = f"{_MACRO}_{index}"
        checkpoint = FrozenCheckpoint(
            macro=macro, path=teacher.where, model_dir=model_dir, use_ema=use_ema
        )
        model = run_model.model(run=teacher.where, macro=f"{_MACRO}: {name}")
        made.append(Teacher(model=model, checkpoint=checkpoint))
    return Teachers(teachers=made)


def _names(pool: pools.Pool, path: str) -> list[str]:
    if not pool.fixed and len(pool.teachers) > 1:
        raise DataError(
            f"{path}: the pool has several teachers and no 'fixed', which names the one of each language. Add it"
        )
    used = set(pool.fixed.values()) or set(pool.teachers)
    return [name for name in pool.teachers if name in used]
