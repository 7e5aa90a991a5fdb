"""Data sets of Hugging Face as Arrow files: folders of `save_to_disk`, and sets of the hub in the local cache of `datasets`.

    data/my_set                                     a folder of Dataset.save_to_disk, or of DatasetDict.save_to_disk
    hf://OWNER/NAME@REVISION                        a set of the hub, at a commit
    hf://OWNER/NAME/CONFIG@REVISION:SPLIT           its configuration, and one of its splits

The files are read without the library. Only a set of the hub that is not in its cache is asked of it; it downloads and converts
the set. Code that comes with a set is never run.
"""

import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from espalier.common.storage import paths
from espalier.data.text.row_files import DataError

SCHEME = "hf://"
_STATE, _INFO, _DICT = "state.json", "dataset_info.json", "dataset_dict.json"
_ADDRESS = re.compile(
    r"hf://(?P<repo>[\w.-]+/[\w.-]+)(/(?P<config>[^/@:]+))?(@(?P<revision>[^/@:]*))?(:(?P<split>[\w.-]+))?"
)
_OFFLINE = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE")


class _HubSet(NamedTuple):
    address: str
    repo: str
    config: str | None
    revision: str
    split: str | None


def is_address(path: str | os.PathLike) -> bool:
    """Returns whether a path is the address of a set of the hub."""
    return os.fspath(path).startswith(SCHEME)


def is_set(path: str | os.PathLike) -> bool:
    """Returns whether a path is the address of a set of the hub, or a folder of `save_to_disk`."""
    if is_address(path) or paths.exists(paths.join(path, _DICT)):
        return True
    return all(paths.exists(paths.join(path, name)) for name in (_STATE, _INFO))


def has_split(path: str, split: str) -> bool:
    """Returns whether a path is a set of several splits with this one."""
    if is_address(path):
        hub = _parse(path)
        return hub.split is None and split in _cached_splits(hub)
    return paths.exists(paths.join(path, _DICT)) and split in _splits(path)


def files(path: str, split: str) -> list[str]:
    """Returns the Arrow files of a set, in the order of its rows.

    Args:
      path: an address of the hub, or a folder of `save_to_disk`.
      split: which split of a set of several; an address or folder of one split is that one.

    Raises:
      DataError: the set has no such split, is damaged, or was saved in a form that is not read.
      ValueError: the address is malformed, or does not name a commit.
      FileNotFoundError: the set is not in the cache and cannot be had, or a file is missing.
    """
    if is_address(path):
        hub = _parse(path)
        folder, every = _cached(hub), _cached_splits(hub)
        return _hub_files(hub, folder, _one(path, hub.split or split, every, f"{path}:SPLIT"))
    if paths.exists(paths.join(path, _DICT)):
        path = paths.join(path, _one(path, split, _splits(path), paths.join(path, "SPLIT")))
    return _saved_files(path)


def check_outside(found: Sequence[str]) -> None:
    """Raises DataError if one of several files is a part of a folder of `save_to_disk`."""
    parts = [path for path in found if path.endswith((".arrow", _STATE))]
    for folder, path in {os.path.dirname(path): path for path in parts}.items():
        if is_set(folder):
            raise DataError(
                f"{path} is a part of a data set that save_to_disk wrote: give its folder, {folder}"
            )


def _one(path: str, split: str, every: Sequence[str], remedy: str) -> str:
    if split not in every:
        raise DataError(
            f"{path}: the data set has the splits {', '.join(every)}, and none {split!r}; give one of them ({remedy})"
        )
    return split


def _splits(folder: str) -> list[str]:
    found = _json(paths.join(folder, _DICT)).get("splits")
    if not isinstance(found, list) or not all(isinstance(x, str) for x in found):
        raise DataError(f"{paths.join(folder, _DICT)}: no list of splits; save the set again")
    return found


def _json(path: str) -> dict:
    try:
        content = json.loads(paths.read(path))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist, which each folder of save_to_disk has; save the set again"
        ) from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); save the data set again") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: not an object of JSON; save the data set again")
    return content


def _saved_files(folder: str) -> list[str]:
    """Returns the files of one Dataset; raises DataError if the rows that it shows are not those of the files."""
    place = paths.join(folder, _STATE)
    state = _json(place)
    again = f"datasets.load_from_disk({folder!r})"
    if any(state.get(key) for key in ("_indices_data_files", "_indices_files")):
        raise DataError(
            f"{place}: the set is a selection of rows ('_indices_data_files'), which is not read: write its rows with "
            f"{again}.flatten_indices().save_to_disk(...)"
        )
    shown, every = state.get("_format_columns"), _json(paths.join(folder, _INFO)).get("features")
    hidden = set(every or ()) - set(shown or every or ())
    if hidden and not state.get("_output_all_columns"):
        raise DataError(
            f"{place}: the set was saved with a format that shows only the columns {shown}, which is "
            f"not read: save {again}.with_format(None), of the columns you want (select_columns)"
        )
    listed = state.get("_data_files")
    names = [str(x["filename"]) for x in listed or () if isinstance(x, dict) and "filename" in x]
    if not names or any(os.path.basename(name) != name for name in names):
        raise DataError(f"{place}: no list of files ('_data_files'); save the data set again")
    found = [paths.join(folder, name) for name in names]
    if missing := [path for path in found if not paths.exists(path)]:
        raise FileNotFoundError(
            f"{missing[0]} does not exist, which {place} names; copy or save the set again"
        )
    return found


def _parse(address: str) -> _HubSet:
    match = _ADDRESS.fullmatch(address)
    if not match:
        raise ValueError(
            f"{address!r} is no set of the hub; write hf://OWNER/NAME@REVISION, with a configuration "
            "hf://OWNER/NAME/CONFIG@REVISION, and of one split hf://OWNER/NAME@REVISION:SPLIT"
        )
    repo, config, revision, split = match.group("repo", "config", "revision", "split")
    if not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise ValueError(
            f"{address!r}: the revision is {revision or 'not given'}, and the set may change under it. Give the commit in 40 "
            f"hexadecimal digits (hf://{repo}{'/' + config if config else ''}@COMMIT), as "
            f"https://huggingface.co/datasets/{repo}/commits/main lists them"
        )
    return _HubSet(address, repo, config, revision, split)


def _root() -> str:
    """Returns the folder in which `datasets` keeps what it has prepared."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    return os.path.expanduser(os.environ.get("HF_DATASETS_CACHE") or os.path.join(home, "datasets"))


def _cached(hub: _HubSet) -> pathlib.Path:
    """Returns the folder of a set in the cache; downloads the set if it is not there."""
    found = _find(hub)
    if not found:
        _download(hub)
        found = _find(hub)
    wanted = hub.config or "default"
    if wanted in found:
        return found[wanted]
    if found:
        raise DataError(
            f"{hub.address}: the set has the configuration {', '.join(sorted(found))} in {_root()}, not {wanted!r}; name it: "
            f"hf://{hub.repo}/CONFIG@{hub.revision}"
        )
    raise FileNotFoundError(
        f"{hub.address}: datasets has prepared no such commit in {_root()}. {_remedy(hub)}"
    )


def _find(hub: _HubSet) -> dict[str, pathlib.Path]:
    """Returns {configuration: folder} of this commit in the cache: the wanted one, or all if it is not there."""
    owner, name = hub.repo.split("/")

    def plain(text: str) -> str:  # the cache writes NameOfSet as name_of_set
        return text.replace("_", "").lower()

    found = {
        info.parent.parent.parent.name: info.parent
        for info in pathlib.Path(_root()).glob(f"{owner}___*/*/*/{hub.revision}/{_INFO}")
        if plain(info.parts[-5].removeprefix(f"{owner}___")) == plain(name)
    }
    if hub.config is not None:  # another one may be there while this one is not
        return {hub.config: found[hub.config]} if hub.config in found else {}
    return found


def _cached_splits(hub: _HubSet) -> list[str]:
    place = _cached(hub) / _INFO
    splits = _json(str(place)).get("splits")
    if not isinstance(splits, dict) or not splits:
        raise DataError(f"{place}: no splits; delete the folder, and prepare the set again")
    return list(splits)


def _hub_files(hub: _HubSet, folder: pathlib.Path, split: str) -> list[str]:
    pattern = re.compile(rf".+-{re.escape(split)}(-\d{{5}}-of-(?P<count>\d{{5}}))?\.arrow")
    found = {
        path.name: match for path in folder.iterdir() if (match := pattern.fullmatch(path.name))
    }
    counts = {int(match["count"] or 1) for match in found.values()}
    if counts != {len(found)}:
        raise DataError(
            f"{hub.address}: {folder} has {len(found)} files of the split {split!r}, of {max(counts, default=1)}; delete the "
            "folder, and prepare the set again"
        )
    return [str(folder / name) for name in sorted(found)]


def _remedy(hub: _HubSet) -> str:
    arguments = ", ".join(
        [repr(hub.repo), *([repr(hub.config)] if hub.config else []), f"revision={hub.revision!r}"]
    )
    return (
        "Where there is network, run\n"
        f"  python -c \"import datasets; datasets.load_dataset({arguments}).save_to_disk('DIR')\"\n"
        f"copy DIR here and give it in the address's place; or copy {_root()} here, and set HF_DATASETS_OFFLINE=1"
    )


def _download(hub: _HubSet) -> None:
    """Lets `datasets` prepare a set in its cache; raises FileNotFoundError, with the remedy, if it cannot."""
    for name in _OFFLINE:
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            raise FileNotFoundError(
                f"{hub.address}: the commit is not in {_root()}, and {name} is set. {_remedy(hub)}"
            )
    try:
        import datasets
    except ModuleNotFoundError:
        raise FileNotFoundError(
            f"{hub.address}: the commit is not in {_root()}, and the package datasets, which downloads it, is not installed: "
            f"pip install -e '.[datasets]'. {_remedy(hub)}"
        ) from None
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise FileNotFoundError(
            f"{hub.address}: the commit is not in {_root()}, and version {datasets.__version__} of the package datasets runs code "
            f"that comes with sets: pip install 'datasets>=4'. {_remedy(hub)}"
        )
    try:
        datasets.load_dataset(hub.repo, hub.config, revision=hub.revision)
    except Exception as error:  # of the library, its HTTP client and its readers of files
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise FileNotFoundError(
            f"{hub.address}: the commit is not in {_root()}, and datasets cannot get it "
            f"({type(error).__name__}: {reason}). {_remedy(hub)}"
        ) from None
