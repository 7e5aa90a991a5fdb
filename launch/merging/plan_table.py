"""The table of a plan, which a dry run prints."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from espalier.launch.merging.plan import Planned
from espalier.model.transforms.base import aligned
from espalier.model.transforms.merge import Job
from espalier.model.transforms.merge_methods import METHODS


def table(planned: Sequence[Planned]) -> list[str]:
    """Returns lines of a table of the tensors: name, shape, dtype, method with its parameters, inputs."""
    paths = list(dict.fromkeys(path for x in planned for path, _ in x.inputs))
    numbers = {path: f"m{i}" for i, path in enumerate(paths)}
    rows = [("tensor", "shape", "dtype", "merged by", "of")]
    for x in planned:
        how = "equal in all" if x.job is None else _shown(x.job)
        inputs = [
            f"{numbers[path]}:{name}" if name != x.name else numbers[path]
            for path, name in x.inputs
        ]
        shape = " x ".join(map(str, x.shape)) or "1"
        rows.append((x.name, shape, x.out_dtype.name, how, " ".join(inputs)))
    return [*(f"{number} = {path}" for path, number in numbers.items()), *aligned(rows, right=())]


def _shown(job: Job) -> str:
    method = METHODS[job.method]
    words = []
    for name, value in job.values.items():
        if value != method.parameters[name].default and value is not None:
            shown = ",".join(map(_number, value)) if isinstance(value, list) else _number(value)
            words.append(f"{name}={shown}")
    return " ".join([job.method, *words])


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def out_bytes(planned: Sequence[Planned]) -> int:
    """Returns the bytes of the output's tensors."""
    return sum(int(np.prod(x.shape)) * x.out_dtype.itemsize for x in planned)
