"""The record of a merge, merge.json, and the model card of its result."""

import json
import os
from collections.abc import Mapping
from typing import Any

from espalier.launch.merging.models import Model, NativeModel
from espalier.launch.merging.plan import Planner
from espalier.launch.merging.settings import Merge

RECORD = "merge.json"
NAME = "README.md"


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
