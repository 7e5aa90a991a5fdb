"""What is said of a merge: the table of its plan, which a dry run prints, its record, merge.json, and the model card."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.merge.models import Model, NativeModel
from espalier.launch.merge.plan import Planned, Planner
from espalier.launch.merge.settings import Merge
from espalier.model.transforms.base import aligned
from espalier.model.transforms.merge import Job
from espalier.model.transforms.merge_methods import METHODS

RECORD = "merge.json"
NAME = "README.md"


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


def record(planner: Planner) -> dict[str, Any]:
    """Returns the record of a result: the configuration as it was read, the seed, and the models."""
    return {
        "configuration": json.loads(json.dumps(planner.merge.text, default=str)),
        "seed": planner.seed,
        "made_of": made_of(planner.merge, planner.models),
    }


def made_of(merge: Merge, models: Mapping[str, Model]) -> list[str]:
    """Returns the names of the models, with the steps of runs, as model cards show parents."""
    names = []
    for path in merge.merged_models():
        model = models[path]
        name = os.path.basename(os.path.abspath(os.fspath(model.folder)))
        step = f", step {model.source.step.name}" if isinstance(model, NativeModel) else ""
        names.append(f"{name}{step}")
    return names


def text(name: str, merge: Merge, record: Mapping[str, Any]) -> str:
    """Returns the model card."""
    import yaml

    parents = [f"- `{model}`" for model in record["made_of"]]
    configuration = yaml.safe_dump(
        record["configuration"], sort_keys=False, allow_unicode=True, default_flow_style=None
    )
    seed = f", seed {record['seed']}" if is_random(merge) else ""
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags: [merge]",
            "# license: fill in, such as apache-2.0",
            "---",
            f"# {name.removeprefix('.').removesuffix('.partial')}",
            "",
            f"A merge by the method `{merge.method}`{seed} of:",
            "",
            *parents,
            "",
            f"Made by Espalier (`espalier merge`) with this configuration, also in `{RECORD}`:",
            "",
            "```yaml",
            configuration.rstrip().replace("```", "` ` `"),
            "```",
            "",
            "## Licence",
            "",
            "**To be filled in.** It depends on the licences of the models above.",
            "",
        ]
    )


def is_random(merge: Merge) -> bool:
    """Returns whether the method of a merge draws random numbers."""
    from espalier.model.transforms.merge_methods import METHODS

    return METHODS[merge.method].random
