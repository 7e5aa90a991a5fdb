"""Modules that have moved: a configuration that was written before imports them by their former names."""

import pathlib
import re
from typing import TYPE_CHECKING

from espalier.launch import environment

if TYPE_CHECKING:
    from gin.config_parser import ImportStatement

# Former name -> name, of modules, and of folders with a dot: their names alone are commands. The first that fits counts.
MOVED = {
    "launch.evaluation.skills": "espalier.launch.code_mix.skills",
    "launch.preparation.embed_domains": "espalier.launch.nexus.embed_domains",
    "launch.evaluation.": "espalier.launch.evaluate.",
    "launch.preparation.": "espalier.launch.prepare.",
    "launch.run.beginnings": "espalier.launch.run.phase",
    "launch.run.load_run": "espalier.launch.load.load_run",
    "launch.run.run_model": "espalier.launch.load.run_model",
    "launch.run.reference": "espalier.launch.preference.reference",
    "launch.run.teacher": "espalier.launch.distillation.teacher",
    "data.aya23.toy_languages": "espalier.launch.papers.aya23.toy_languages",
    "data.aya_expanse.lexicon": "espalier.launch.papers.aya_expanse.lexicon",
    "data.aya_expanse.lexicon_text": "espalier.launch.papers.aya_expanse.lexicon_text",
    "data.code_mix.skill_sources": "espalier.launch.papers.code_mix.skill_sources",
    "data.influence.small_corpus": "espalier.launch.papers.influence.small_corpus",
    "data.mov.compositions": "espalier.launch.papers.mov.compositions",
    "data.nexus.lag_domains": "espalier.launch.papers.nexus.lag_domains",
    "data.preference.topic_language": "espalier.launch.papers.preference.topic_language",
    "data.snapkv.retrieval": "espalier.launch.papers.snapkv.retrieval",
}


def today(statement: "ImportStatement") -> "ImportStatement":
    """Returns the import statement of a module under its present name; it binds the same name as the former import."""
    module = name_of_today(statement.module)
    if not statement.is_from or module == statement.module:
        return statement
    bound = statement.bound_name()
    return statement._replace(
        module=module, alias=None if bound == module.rpartition(".")[2] else bound
    )


def name_of_today(module: str) -> str:
    """Returns the name of a module that has moved, or was importable without `espalier.`; the same name for any other."""
    bare = f"{module.removeprefix('espalier.')}."
    for former, now in MOVED.items():
        if bare.startswith(f"{former.rstrip('.')}."):
            return (now + bare.removeprefix(former)).rstrip(".")
    path = pathlib.Path(environment.ROOT, *module.split("."))
    own = module.partition(".")[0] in environment.EARLIER_PACKAGES
    is_there = own and (path.is_dir() or path.with_suffix(".py").is_file())
    return f"espalier.{module}" if is_there else module


def as_before(text: str) -> str:
    """Returns a text with modules under their former names, so that its digest equals one from before a move."""
    for former, now in MOVED.items():
        text = re.sub(rf"\b{re.escape(now)}\b", former, text)
    return re.sub(rf"\bespalier\.(?=(?:{'|'.join(environment.EARLIER_PACKAGES)})\b)", "", text)
