"""Modules that have moved: a configuration that was written before imports them by their former names."""

import re

# Former name -> name.
MOVED = {
    "data.aya23.toy_languages": "launch.papers.aya23.toy_languages",
    "data.aya_expanse.lexicon": "launch.papers.aya_expanse.lexicon",
    "data.aya_expanse.lexicon_text": "launch.papers.aya_expanse.lexicon_text",
    "data.code_mix.skill_sources": "launch.papers.code_mix.skill_sources",
    "data.influence.small_corpus": "launch.papers.influence.small_corpus",
    "data.mov.compositions": "launch.papers.mov.compositions",
    "data.nexus.lag_domains": "launch.papers.nexus.lag_domains",
    "data.preference.topic_language": "launch.papers.preference.topic_language",
    "data.snapkv.retrieval": "launch.papers.snapkv.retrieval",
}
_IMPORT = re.compile(r"^from ([\w.]+) import (\w+)(?: as (\w+))?", re.MULTILINE)


def renamed(text: str) -> str:
    """Returns the text of a gin file, with imports of moved modules by their names of today."""
    return _IMPORT.sub(_import, text)


def as_before(text: str) -> str:
    """Returns a text with moved modules by their former names, of which digests from before a move are made."""
    for former, today in MOVED.items():
        text = re.sub(rf"\b{re.escape(today)}\b", former, text)
    return text


def _import(match: re.Match[str]) -> str:
    package, name, alias = match.groups()
    module = MOVED.get(f"{package}.{name}")
    if module is None:
        return match.group()
    package, _, today = module.rpartition(".")
    bound = alias or name
    return f"from {package} import {today}" + (f" as {bound}" if bound != today else "")
