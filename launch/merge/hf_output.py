"""Writes a merge as a Hugging Face folder, block by block; a run that was killed continues where it was."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common import files
from espalier.data.tokenizers import chat_template, hf_tokenizer
from espalier.launch.convert import model_card
from espalier.launch.merge import output, tokens
from espalier.launch.merge.models import CONFIG, HfModel
from espalier.launch.merge.output import Journal, Workers, progress
from espalier.launch.merge.plan import Planned, Planner
from espalier.launch.merge.settings import MergeError
from espalier.launch.weights.target_folder import check_space, new_directory
from espalier.model.config import LayerKind
from espalier.model.hf import registry
from espalier.model.hf.config_fields import UnsupportedConfig
from espalier.model.hf.files.safetensors_files import SafetensorsWriter

_FLUSH_BYTES = 256 << 20  # a power cut loses at most the work on so many bytes
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_OF_LAYERS = (
    "layer_types",
    "mlp_layer_types",
    "no_rope_layers",
)  # lists with a value for each layer
_DENSE = "mlp_only_layers"  # the numbers of layers without experts


def write(
    planner: Planner,
    planned: Sequence[Planned],
    target: str,
    *,
    shard_bytes: int,
    workers: Workers,
) -> None:
    """Writes the folder `target`, which must not exist.

    Raises:
      MergeError, TransformError, ConvertError, OSError.
    """
    config, record = _config(planner, planned), output.record(planner)
    sizes = {x.name: (x.out_dtype, x.shape) for x in planned}
    fingerprint = output.fingerprint(planner, planned, shard_bytes=shard_bytes, config=config)
    with new_directory(
        target, goes_on=lambda folder: output.finished(folder, fingerprint) is not None
    ) as folder:
        entries = output.finished(folder, fingerprint)
        done, again = {*(entries or ())}, entries is not None
        if not again:
            check_space(folder, output.out_bytes(planned))
        journal, waiting = Journal(folder, fingerprint, again=again), _Waiting()
        with (
            SafetensorsWriter(folder, sizes, shard_bytes=shard_bytes, again=again) as writer,
            progress(planned, initial=sum(writer.tensors[x].nbytes for x in done)) as bar,
        ):
            for x in planned:
                if x.name in done:
                    continue
                for low, values in workers.run(x, _reads(x, planner)):
                    writer.write_values(x.name, values, low)
                    bar.update(values.nbytes)
                if names := waiting.add(x.name, writer.tensors[x.name].nbytes):
                    writer.flush()  # before they are listed
                    journal.add(names)
            journal.finish()
        _write_rest(pathlib.Path(folder), planner, config, record)


class _Waiting:
    """The finished tensors that are not listed yet."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._size = 0

    def add(self, name: str, nbytes: int) -> list[str]:
        """Returns the names of all tensors that wait, once these are large enough; else none."""
        self._names.append(name)
        self._size += nbytes
        if self._size < _FLUSH_BYTES:
            return []
        names, self._names, self._size = self._names, [], 0
        return names


def _reads(x: Planned, planner: Planner) -> list[Any]:
    """Returns the functions that read the inputs, by the output's rows if the tensor is a table of a re-indexed vocabulary."""
    models, vocabulary = planner.models, planner.vocabulary
    reads = [models[path].read(name) for path, name in x.inputs]
    paths = [path for path, _ in x.inputs]
    first = models[paths[0]].tensors[x.inputs[0][1]]
    if vocabulary is None or not first.is_vocabulary(vocabulary.sizes[paths[0]]):
        return reads
    width = int(np.prod(x.shape[1:]))
    return [
        tokens.reader(tokens.rows_of(vocabulary, paths, path), reads, width, dtype)
        for path, dtype in zip(paths, x.dtypes, strict=True)
    ]


def _config(planner: Planner, planned: Sequence[Planned]) -> dict[str, Any]:
    """Returns the output's config.json: the donor's, with the new depth, vocabulary and dtype."""
    donor = planner.donor
    assert isinstance(donor, HfModel)
    config = dict(donor.config)
    if not config:
        return {}
    # By default, the decoder is as deep as the encoder.
    if len(planner.layers) > 1 and "num_layers" in config:
        config["num_decoder_layers"] = config.get("num_decoder_layers") or config["num_layers"]
    for stack, origins in planner.layers.items():
        before = donor.depth(stack)
        same = origins == [(path, i) for i, (path, _) in enumerate(origins)]
        if len(origins) != before or not same:
            _change_depth(planner, config, stack, before)
    if planner.vocabulary is not None:
        config = tokens.with_token_ids(config, planner.vocabulary, donor)
        config["vocab_size"] = planner.vocabulary.size
    sizes: dict[str, int] = {}
    for x in planned:
        sizes[x.out_dtype.name] = sizes.get(x.out_dtype.name, 0) + int(np.prod(x.shape))
    dtype = max(sizes, key=sizes.__getitem__)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    return config | dict.fromkeys(keys, dtype)


def _change_depth(planner: Planner, config: dict[str, Any], stack: str, before: int) -> None:
    file, origins = planner.merge.file, planner.layers[stack]
    keys = [key for key in _DEPTHS if config.get(key) == before]
    if "decoder" in stack and config.get("num_decoder_layers") is not None:
        keys = ["num_decoder_layers"]
    if not keys:
        raise MergeError(
            f"{file}: config.json of the first model has no number of layers of {stack} ({before}): slices of this "
            "model are not supported."
        )
    config[keys[0]] = len(origins)
    own = [getattr(planner.models[path], "config", {}) for path, _ in origins]
    for key in _OF_LAYERS:
        values = [
            one[key][layer]
            for one, (_, layer) in zip(own, origins, strict=True)
            if isinstance(one.get(key), list) and layer < len(one[key])
        ]
        if values and len(values) < len(origins):
            raise MergeError(
                f"{file}: some config.json have {key}, and others do not: add it to all."
            )
        config |= {key: values} if values else {}
    if any(one.get(_DENSE) for one in own):
        config[_DENSE] = [
            i for i, (_, layer) in enumerate(origins) if layer in (own[i].get(_DENSE) or ())
        ]
    if "layer_types" in config:
        config.pop("sliding_window_pattern", None)
    kinds = {path: _kinds(one) for (path, _), one in zip(origins, own, strict=True)}
    merged = _kinds(config) if len(planner.layers) == 1 else None
    for i, (path, layer) in enumerate(origins):
        # Of models that no family reads.
        period = 1 if "layer_types" in config else own[i].get("sliding_window_pattern") or 1
        before_it = kinds[path]
        if layer % period != i % period or (
            merged is not None and before_it is not None and merged[i] != before_it[layer]
        ):
            raise MergeError(
                f"{file}: layer {layer} of {path} would become layer {i}, which has another kind of attention or MLP by "
                "config.json: take layers in the order and at the distance that these repeat in."
            )


def _kinds(config: Mapping[str, Any]) -> list[LayerKind] | None:
    """Returns the kinds of the layers of a config.json; None if no family reads it."""
    try:
        sizes = registry.family_of_config(config).model(config).config
    except UnsupportedConfig:
        return None
    return [sizes.layer_kind(layer) for layer in range(sizes.num_layers)]


def _write_rest(
    folder: pathlib.Path,
    planner: Planner,
    config: Mapping[str, Any],
    record: Mapping[str, Any],
) -> None:
    """Writes config.json, the tokenizer, the record and the model card."""
    vocabulary = planner.vocabulary
    source = planner.donor.folder if vocabulary is None else vocabulary.folder
    hf_tokenizer.copy(source, folder)
    if vocabulary is not None:
        (folder / hf_tokenizer.TOKENIZER).write_bytes(vocabulary.content)
        for name in ("vocab.json", "merges.txt", "added_tokens.json", hf_tokenizer.SENTENCEPIECE):
            (folder / name).unlink(missing_ok=True)  # of the vocabulary before
    # Not synced: a merge that a power cut stops is repeated.
    if config:
        files.write_json(folder / CONFIG, config, synced=False, indent=2, end="\n")
    if planner.merge.chat_template is not None:
        _set_template(folder, planner)
    files.write_json(folder / output.RECORD, record, synced=False, indent=2, end="\n")
    (folder / model_card.NAME).write_text(
        output.text(folder.name, planner.merge, record), encoding="utf-8"
    )


def _set_template(folder: pathlib.Path, planner: Planner) -> None:
    merge = planner.merge
    chosen = str(merge.chat_template)
    if chosen == "auto":
        counts: dict[str, tuple[int, Any]] = {}
        for path in merge.models():
            template = _template_of(planner.models[path].folder)
            if template is not None:
                count, _ = counts.get(template, (0, None))
                counts[template] = (count + 1, path)
        if not counts:
            raise MergeError(
                f"{merge.file}: chat_template: auto, but no model has a chat template."
            )
        text = max(counts, key=lambda x: counts[x][0])
    elif "{" in chosen:
        text = chosen
    else:
        text = chat_template.named(chosen).templates[chat_template.DEFAULT]
    config_file = folder / hf_tokenizer.CONFIG
    if config_file.exists():
        settings = json.loads(config_file.read_bytes())
        settings.pop("chat_template", None)
        files.write_json(config_file, settings, synced=False, indent=2, end="\n")
    (folder / chat_template.FILE).write_text(text, encoding="utf-8")


def _template_of(folder: pathlib.Path) -> str | None:
    if not (folder / hf_tokenizer.TOKENIZER).exists():
        return None
    template = hf_tokenizer.read(folder).chat_template
    return None if template is None else template.templates.get(chat_template.DEFAULT)
