"""Refuses models that compute different functions of their weights, before anything is written."""

import itertools
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common import checkpoint_files
from espalier.data.tokenizers import hf_tokenizer
from espalier.launch.merge.models import HEAD, HfModel, Model, NativeModel
from espalier.launch.merge.settings import Merge, MergeError
from espalier.launch.weights import source_models
from espalier.model.hf import registry
from espalier.model.hf.config_fields import SILENT, UnsupportedConfig
from espalier.model.hf.family import Family, UnsupportedModel
from espalier.model.transforms.base import TransformError

_ROPE = ("rope_scaling", "rope_parameters", "rope_theta")
_EMBEDDING = re.compile(
    r"(^|[./])(token_embed|embed_tokens|embed_in|wte|shared|word_embeddings)([./]|$)"
)
# Numbers of layers, and what else differs with them; hf_output compares the kinds of the layers themselves.
_OF_DEPTH = {
    *("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "n_layers"),
    *("layer_types", "mlp_layer_types", "no_rope_layers", "mlp_only_layers", "max_window_layers"),
    *("decoder_sparse_step", "sliding_window_pattern", "no_rope_layer_interval"),
}


def copies(model: Model) -> dict[str, str]:
    """Returns the tensors that repeat another one by config.json, such as a tied head, with that one's name."""
    if not isinstance(model, HfModel):
        return {}
    if family := _family(model.config):
        pairs = dict(family.tied)
        pairs |= {
            copy: x.removeprefix(family.prefix)
            for copy, x in pairs.items()
            if x not in model.tensors
        }
    else:
        table = next(filter(_EMBEDDING.search, model.tensors), "")
        pairs = {name: table for name in model.tensors if HEAD.fullmatch(name)}
    pairs = {copy: x for copy, x in pairs.items() if {copy, x} <= model.tensors.keys()}
    if pairs and facts(model.config)[0].get("tie_word_embeddings") is not True:
        pairs = {copy: x for copy, x in pairs.items() if not HEAD.fullmatch(copy)}
    return pairs


def check_copies(merge: Merge, models: Mapping[str, Model]) -> None:
    """Raises MergeError if a tensor is left out of the output as a copy of another one, and is none."""
    for model in models.values():
        for copy, original in copies(model).items():
            here, there = model.tensors[copy], model.tensors[original]
            same = (here.shape, here.dtype) == (there.shape, there.dtype)
            reads = (model.read(copy), model.read(original))
            size = int(np.prod(here.shape)) if same else 0
            for low in range(0, size, source_models.COMPARED):
                high = min(low + source_models.COMPARED, size)
                a, b = (read(low, high).view(np.uint8) for read in reads)
                same = same and np.array_equal(a, b)
            if not same:
                raise MergeError(
                    f"{merge.file}: {copy} of {model.path} differs from {original}, but config.json ties them. If the model has a "
                    'head of its own, set "tie_word_embeddings": false there; else remove the tensor.'
                )


def check(merge: Merge, models: Mapping[str, Model]) -> None:
    """Checks that models of one kind and of one architecture are merged, with one vocabulary unless it is re-indexed.

    Raises:
      MergeError: they differ; the message names the key and both values.
    """
    opened = [models[path] for path in merge.models()]
    first = opened[0]
    for model in opened:
        if isinstance(model, HfModel) and model.config.get("quantization_config"):
            raise MergeError(
                f"{merge.file}: {model.path}/config.json has quantization_config, and quantised numbers are not merged apart from "
                "their scales: give the model before its quantisation."
            )
    for other in opened[1:]:
        if other.kind != first.kind:
            native, hf = sorted([first, other], key=lambda x: x.kind, reverse=True)
            raise MergeError(
                f"{merge.file}: {native.path} is a run, and {hf.path} a Hugging Face folder: convert one of them first, "
                f"espalier convert --from_hf={hf.path} --to=DIR."
            )
        deep = any(source.layers for part in merge.slices() for source in part.sources)
        if isinstance(other, NativeModel) and isinstance(first, NativeModel):
            _check_native(merge, first, other, deep=deep)
        elif isinstance(other, HfModel) and isinstance(first, HfModel):
            _check_config(merge, first, other, deep=deep)
    if merge.tokens is None and isinstance(first, HfModel):
        _check_tokenizers(merge, [x for x in opened if isinstance(x, HfModel)])
    for key, value in (("tokenizer", merge.tokens), ("chat_template", merge.chat_template)):
        if value is not None and isinstance(first, NativeModel):
            raise MergeError(
                f"{merge.file}: {key}: vocabularies and templates of runs are not changed: export the models with "
                "espalier convert --to_hf, merge them there, and import the result."
            )


def warn(merge: Merge, models: Mapping[str, Model], names: Iterable[str]) -> None:
    """Warns of settings without effect, and of models whose merge is hardly of use; layers of any models may be stacked.

    Args:
      merge: the configuration.
      models: by path.
      names: of the output's tensors.
    """
    of_models = (entry.names for model in models.values() for entry in model.tensors.values())
    _warn_filters(merge, [*dict.fromkeys([*names, *itertools.chain(*of_models)])])
    if merge.method != "passthrough" and merge.tokens is None:
        _warn_unrelated(merge, models)
        _warn_factors(merge, models)


def _warn_filters(merge: Merge, names: Sequence[str]) -> None:
    """Warns of values whose filter or pattern is of no tensor."""
    for name, condition in merge.conditions():
        if not condition.matches(names):
            text = condition.filter if condition.pattern is None else condition.pattern.pattern
            print(
                f"warning: {merge.file}: {name}: no tensor's name has {text!r}, so that its value has no effect.",
                file=sys.stderr,
            )


def _warn_unrelated(merge: Merge, models: Mapping[str, Model]) -> None:
    """Warns of models whose embeddings are not correlated."""
    paths = merge.models()
    for path, correlation in source_models.unlike({x: _embedding(models[x]) for x in paths}):
        print(
            f"warning: the embeddings of {paths[0]} and {path} have a correlation of {correlation:.2f}, as "
            "models of different starts do: their mean is hardly of use.",
            file=sys.stderr,
        )


def _warn_factors(merge: Merge, models: Mapping[str, Model]) -> None:
    """Warns of matrices stored as factors: the product of the merged factors is not the merge of the products."""
    model = models[merge.models()[0]]
    if isinstance(model, NativeModel) and (modules := model.source.factors()):
        print(
            f"warning: {len(modules)} matrices, such as {modules[0]}, are stored as factors U and V, which are merged apart: "
            "their product is not the merge of the matrices. For that, make the models dense first: "
            "espalier upcycle factorise --recompose.",
            file=sys.stderr,
        )


def _embedding(model: Model) -> np.ndarray | None:
    if (name := next(filter(_EMBEDDING.search, model.tensors), None)) is None:
        return None
    size = int(np.prod(model.tensors[name].shape))
    return model.read(name)(0, min(size, source_models.COMPARED))


def _family(config: Mapping[str, Any]) -> Family | None:
    return next((x for x in registry.FAMILIES if x.name == config.get("model_type")), None)


def facts(config: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Returns the fields of a config.json that decide the computed function, and why its family cannot read it, if so.

    Absent fields have the defaults of the family in model/hf/families/; of a config.json that no family reads, only the fields
    that it has are known. The rotary embedding has one spelling, `rope.NAME`.
    """
    silent = {*SILENT, "name_or_path", "attn_implementation", "auto_map", *_ROPE} - {"model_type"}
    of_family, completed, reason = set[str](), dict[str, Any](), None
    if family := _family(config):
        try:
            of_family, completed = {*family.silent}, family.completed(config)
        except (UnsupportedConfig, UnsupportedModel) as error:
            reason = str(error)
    result = {key: x for key, x in config.items() if key not in silent | of_family}
    result |= {key: x for key, x in completed.items() if key not in silent}
    return {**result, **_rope(completed or config)}, reason


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(config.get(key), dict):
            rope |= config[key]
    rope.setdefault("rope_type", rope.pop("type", "default"))
    if config.get("rope_theta") is not None:
        rope.setdefault("rope_theta", config["rope_theta"])
    return {f"rope.{key}": value for key, value in rope.items() if value is not None}


def _check_config(merge: Merge, first: HfModel, other: HfModel, *, deep: bool) -> None:
    (here, unread), (there, other_unread) = facts(first.config), facts(other.config)
    if (unread is None) != (other_unread is None) and here.get("model_type") == there.get(
        "model_type"
    ):
        path = other.path if unread is None else first.path
        raise MergeError(f"{merge.file}: {os.path.join(path, str(unread or other_unread))}")
    written = [{*model.config, *_rope(model.config)} for model in (first, other)]
    ignored = {*(_OF_DEPTH if deep else ()), *(("vocab_size",) if merge.tokens else ())}
    unknown = []
    # Fields of a file before those that follow from them.
    for key in sorted({*here, *there} - ignored, key=lambda x: (x not in set.union(*written), x)):
        name = key.removeprefix("rope.")
        if (key in here) != (key in there):
            unknown.append(f"{name} ({(other if key in here else first).path})")
        elif not _same(here[key], there[key]):
            remedy = (
                "add `tokenizer_source: union` to align vocabularies"
                if key == "vocab_size"
                else "models that compute differently cannot be merged; if one config.json is wrong, correct it"
            )
            raise MergeError(
                f"{merge.file}: {name} is {_shown(here[key], key in written[0])} in {first.path}/config.json, and "
                f"{_shown(there[key], key in written[1])} in {other.path}/config.json: {remedy}."
            )
    if unknown:
        print(
            f"warning: fields that one config.json lacks, and whose default is not known, were not compared: "
            f"{', '.join(unknown)}.",
            file=sys.stderr,
        )


def _shown(value: Any, written: bool) -> str:
    return f"{value!r}{'' if written else ' (by default)'}"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, int | float) and isinstance(b, int | float):
        return float(a) == float(b)
    return bool(a == b)


def _check_native(merge: Merge, first: NativeModel, other: NativeModel, *, deep: bool) -> None:
    but = ("config.num_layers", "layers") if deep else ()
    try:
        source_models.check_alike(first.source, other.source, but=but)
    except TransformError as error:
        raise MergeError(f"{merge.file}: {error}") from None
    records = [x.source.meta.get("upcycled") for x in (first, other)]
    here, there = (record and _experts(record) for record in records)
    if merge.method != "passthrough" and here and there and here != there:
        raise MergeError(
            f"{merge.file}: the experts of {first.path} are {here}, and those of {other.path} are {there}, so that different "
            "experts would be merged: give mixtures with the same experts in one order."
        )


def _experts(record: Mapping[str, Any]) -> str:
    """Returns the names of a mixture's experts in order, and the digest of their domains' embeddings."""
    digest = record.get("domains", {}).get("digest")
    return ", ".join(record.get("experts", ())) + (f" (domains {digest})" if digest else "")


def tokenizer_of(folder: str | os.PathLike) -> bytes | None:
    """Returns a folder's tokenizer.json; None if it has none."""
    return checkpoint_files.read(folder, hf_tokenizer.TOKENIZER)


def _check_tokenizers(merge: Merge, models: Sequence[HfModel]) -> None:
    """Raises MergeError if the models have tokenizers with different ids; warns of those that cannot be compared.

    Raises:
      CheckpointFileError: a file is damaged or not safe to read.
    """
    texts = {model: tokenizer_of(model.folder) for model in models}
    known = [(model, text) for model, text in texts.items() if text is not None]
    others = [model for model, text in texts.items() if text is None]
    files = {checkpoint_files.read(x.folder, hf_tokenizer.SENTENCEPIECE) for x in others}
    if len({*files, *(text for _, text in known[:1])}) > 1:
        print(
            f"warning: the tokenizers of {', '.join(x.path for x in models)} were not all compared, as {others[0].path} has no "
            f"{hf_tokenizer.TOKENIZER}: add it, or make sure that the same ids are the same tokens.",
            file=sys.stderr,
        )
    for model, text in known[1:]:
        first, own = known[0]
        if text == own:
            continue
        ids, theirs = (hf_tokenizer.load(x).get_vocab(with_added_tokens=True) for x in (own, text))
        if ids != theirs:
            token = min(x for x in {*ids, *theirs} if ids.get(x) != theirs.get(x))
            raise MergeError(
                f"{merge.file}: the tokenizers of {first.path} and {model.path} differ: {token!r} has the id "
                f"{ids.get(token, 'none')} in the first and {theirs.get(token, 'none')} in the second. Add "
                "`tokenizer_source: union` (or base) to align vocabularies."
            )
