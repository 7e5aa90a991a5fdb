"""A Hugging Face checkpoint instead of a run: its model and tokenizer as a run records them, its weights from its own files.

Commands with --checkpoint so read a model that `espalier convert` has not imported. Layers are not stacked, as decoding reads
them, and weights are not copied on the way but to transpose kernels.
"""

import atexit
import collections
import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from espalier.common import files
from espalier.launch.load.loaded_run import LoadError

CONFIG_JSON = "config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """The model of a checkpoint, and how its tensors become parameters.

    Attributes:
      family: name of its family in model/hf/families/.
      model: the linen module, with the dtype of most parameters as `param_dtype`.
      plan: a model.hf.plan.Plan.
    """

    family: str
    model: Any
    plan: Any


def is_hf(checkpoint: str | os.PathLike) -> bool:
    """Returns whether a directory has a config.json and no run's checkpoints."""
    from espalier.trainers.checkpoints import step_dir

    folder = pathlib.Path(checkpoint)
    own = (step_dir.MANIFEST, step_dir.META, step_dir.CHECKPOINTS)
    return (folder / CONFIG_JSON).is_file() and not any((folder / name).exists() for name in own)


def weights(
    tensors: Any, config: Mapping[str, Any], *, dtype: str | None = None, scan_layers: bool = True
) -> Weights:
    """Returns the model of a config.json with its plan.

    Args:
      tensors: a model.hf.plan.Source.
      config: the content of config.json.
      dtype: dtype of the parameters; None for the dtypes of the tensors.
      scan_layers: whether the parameters of layers are stacked.

    Raises:
      UnsupportedConfig, MismatchedTensors, UnsuitableDtypeError.
    """
    from espalier.model.hf.plan import plan
    from espalier.model.hf.registry import family_of_config

    family = family_of_config(config)
    model = family.model(config)
    model = _with_config(model, scan_layers=scan_layers)
    planned = plan(family, model, tensors, dtype=dtype)
    sizes: collections.Counter[str] = collections.Counter()
    for array in planned.arrays.values():
        sizes[array.dtype.name] += array.nbytes
    stored = sizes.most_common(1)[0][0]
    return Weights(family=family.name, model=_with_config(model, param_dtype=stored), plan=planned)


def _with_config(model: Any, **settings: Any) -> Any:
    return model.clone(config=dataclasses.replace(model.config, **settings))


def write_record(folder: str | os.PathLike, model: Any, tokenizer: pathlib.Path) -> dict[str, Any]:
    """Writes config.gin and model.json of a model, and a copy of its tokenizer, into a run's directory.

    Args:
      tokenizer: directory with the tokenizer's files, if it has some.

    Returns:
      The facts about texts for the checkpoint's meta.
    """
    from espalier.launch.config import gin_writer
    from espalier.launch.run import model_record

    pathlib.Path(folder, model_record.CONFIG).write_text(gin_writer.write(model), encoding="utf-8")
    model_record.write(folder)
    # There is no token before a text except the tokenizer's BOS. Targets of encoder-decoders, here T5, follow token 0.
    return {"start_token": 0 if model.row.encodes else None, **_keep_tokenizer(folder, tokenizer)}


def _keep_tokenizer(folder: str | os.PathLike, source: pathlib.Path) -> dict[str, Any]:
    from espalier.data.tokenizers import hf_tokenizer
    from espalier.launch.run import run_vocabulary
    from espalier.model.hf.files.safetensors_files import read_json

    if not any(
        (source / name).exists() for name in (hf_tokenizer.TOKENIZER, hf_tokenizer.SENTENCEPIECE)
    ):
        print(
            f"{source} has no {hf_tokenizer.TOKENIZER} and no {hf_tokenizer.SENTENCEPIECE} (T5's spiece.model under that "
            "name): the run accepts tokens, not texts.",
            file=sys.stderr,
        )
        return {}
    digest = run_vocabulary.save_files(folder, source)
    vocabulary = run_vocabulary.load(folder=os.fspath(folder))
    if hasattr(vocabulary, "files"):
        return {"vocabulary": digest, "add_bos": vocabulary.files.adds_bos}
    # A SentencePiece model alone; transformers begins texts with BOS by default.
    path = source / hf_tokenizer.CONFIG
    settings = read_json(path) if path.exists() else {}
    adds_bos = vocabulary.bos_id != -1 and bool(settings.get("add_bos_token", True))
    return {"vocabulary": digest, "add_bos": adds_bos}


def recorded(checkpoint: str) -> tuple[str, Mapping[str, Any]]:
    """Returns a directory with the record of a checkpoint's model and tokenizer, and the meta of `write_record`.

    The directory is one for each checkpoint and state of its files, and deleted when the process ends.

    Raises:
      CheckpointFileError, UnsupportedConfig, MismatchedTensors, UnsuitableDtypeError.
    """
    return _recorded(os.path.abspath(checkpoint), _state(checkpoint))


def _state(folder: str) -> tuple[tuple[Any, ...], ...]:
    """Returns names and facts of a directory's files, which change if one of them is replaced."""
    with os.scandir(folder) as entries:
        facts = [(x.name, x.stat()) for x in entries if x.is_file()]
    return tuple(sorted((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in facts))


@functools.cache
def _recorded(checkpoint: str, state: tuple[Any, ...]) -> tuple[str, Mapping[str, Any]]:
    from espalier.model.hf.config_fields import named
    from espalier.model.hf.files.safetensors_files import SafetensorsReader, read_json
    from espalier.model.hf.registry import family_of_config

    del state  # a part of the key
    source = pathlib.Path(checkpoint)
    config = read_json(source / CONFIG_JSON)
    with named(source):
        family_of_config(config).model(config)  # raises before files are opened
    folder = tempfile.mkdtemp(prefix="espalier_hf_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with SafetensorsReader(source) as tensors:
        model = weights(tensors, config, scan_layers=False).model
    return folder, write_record(folder, model, source)


def digest(checkpoint: str) -> str:
    """Returns a digest of a checkpoint's settings, tokenizer and weights, whose files have no checksums: reads them all."""
    lines = []
    for path in sorted(pathlib.Path(checkpoint).iterdir()):
        if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".safetensors"):
            lines.append(f"{path.name} {files.sha256(path)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@contextlib.contextmanager
def restoring(
    checkpoint: str, model: Any, *, params: str, weights_dtype: str | None = None
) -> Iterator[Callable[[Any], tuple[Any, Mapping[str, Any]]]]:
    """Context manager: reads the parameters of a model, and meanwhile yields a function that places them.

    The function returns the parameters on the shardings of its argument, and the facts about texts. With `weights_dtype` 'int8', the
    argument has int8 kernels, and a kernel becomes int8 as soon as it is read.

    Raises:
      LoadError: `params` asks for a moving average.
      CheckpointFileError, UnsupportedConfig, UnsupportedModel, MismatchedTensors, UnsuitableDtypeError.
    """
    import jax
    from flax import traverse_util

    from espalier.model.hf import load
    from espalier.model.hf.files.safetensors_files import SafetensorsReader, read_json
    from espalier.model.hf.plan import plan
    from espalier.model.hf.registry import family_of_config
    from espalier.model.transforms import int8_weights

    if params == "ema":
        raise LoadError(
            f"{checkpoint} is a Hugging Face checkpoint, without a moving average: remove --params=ema."
        )
    family = family_of_config(read_json(pathlib.Path(checkpoint) / CONFIG_JSON))
    with (
        SafetensorsReader(checkpoint) as tensors,
        load.filling(
            plan(family, model, tensors), int8_weights.quantised if weights_dtype else None
        ) as filled,
    ):

        def place(abstract: Any) -> tuple[Any, Mapping[str, Any]]:
            arrays, values = filled(), {}
            for path, leaf in traverse_util.flatten_dict(abstract, sep="/").items():
                host = arrays.pop(path).astype(leaf.dtype, copy=False)
                values[path] = jax.device_put(host, leaf.sharding, may_alias=True)
            return traverse_util.unflatten_dict(values, sep="/"), recorded(checkpoint)[1]

        yield place
