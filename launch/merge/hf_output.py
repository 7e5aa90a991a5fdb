"""Writes a merge as a Hugging Face folder, block by block; a run that was killed goes on where it was."""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common import files
from espalier.data.tokenizers import chat_template, hf_tokenizer
from espalier.launch.merge import output, tokens
from espalier.launch.merge.models import CONFIG, HfModel
from espalier.launch.merge.output import Workers, progress
from espalier.launch.merge.plan import Planned, Planner
from espalier.launch.merge.settings import MergeError
from espalier.launch.weights.target_folder import check_space, new_directory
from espalier.model.hf.files.safetensors_files import SafetensorsWriter

_JOURNAL = "merge.progress"
_FLUSH_BYTES = 256 << 20  # a power cut loses at most the work on so many bytes
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


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
    models = planner.models
    config, record = _config(planner, planned), output.record(planner)
    sizes = {x.name: (x.out_dtype, x.shape) for x in planned}
    state = {
        "planned": [repr(x) for x in planned],
        "models": {path: models[path].fingerprint() for path in planner.merge.models()},
        "shard_bytes": shard_bytes,
        "config": config,
        "merge": record,
    }
    text = json.dumps(state, sort_keys=True, default=str)
    fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    with new_directory(
        target, goes_on=lambda folder: _done(folder, fingerprint) is not None
    ) as folder:
        done = _done(folder, fingerprint)
        if done is None:
            check_space(folder, output.out_bytes(planned))
        journal = _Journal(folder, fingerprint, again=done is not None)
        with (
            SafetensorsWriter(
                folder, sizes, shard_bytes=shard_bytes, again=done is not None
            ) as writer,
            progress(
                planned, initial=sum(writer.tensors[name].nbytes for name in done or ())
            ) as bar,
        ):
            for x in planned:
                if x.name in (done or ()):
                    continue
                for low, values in workers.run(x, _reads(x, planner)):
                    writer.write_values(x.name, values, low)
                    bar.update(values.nbytes)
                journal.add(x.name, writer.tensors[x.name].nbytes, writer)
            journal.finish()
        _write_rest(pathlib.Path(folder), planner, config, record)


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


class _Journal:
    """The list of finished tensors in a partial folder; tensors are flushed to disk before they are listed."""

    def __init__(self, folder: str, fingerprint: str, *, again: bool):
        self._path = os.path.join(folder, _JOURNAL)
        self._waiting: list[str] = []
        self._size = 0
        if not again:
            self._append([fingerprint])

    def add(self, name: str, nbytes: int, writer: SafetensorsWriter) -> None:
        self._waiting.append(name)
        self._size += nbytes
        if self._size >= _FLUSH_BYTES:
            writer.flush()
            self._append(self._waiting)
            self._waiting, self._size = [], 0

    def finish(self) -> None:
        os.unlink(self._path)

    def _append(self, lines: Sequence[str]) -> None:
        # Synced, because what it lists is not merged again.
        files.append(self._path, "".join(json.dumps(line) + "\n" for line in lines), synced=True)


def _done(folder: str, fingerprint: str) -> set[str] | None:
    """Returns the finished tensors in a partial folder; None if it is of another merge, or not readable."""
    with contextlib.suppress(OSError, ValueError):
        lines = pathlib.Path(folder, _JOURNAL).read_text("utf-8").splitlines()
        values = []
        for line in lines:
            with contextlib.suppress(ValueError):  # the last may be cut short
                values.append(json.loads(line))
        if values and values[0] == fingerprint:
            return set(values[1:])
    return None


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
    types = []
    for i, (path, layer) in enumerate(origins):
        own = getattr(planner.models[path], "config", {})
        of_layer = own.get("layer_types")
        if isinstance(of_layer, list) and layer < len(of_layer):
            types.append(of_layer[layer])
        elif (
            period := own.get("sliding_window_pattern")
            or (2 if own.get("model_type") == "gemma2" else 1)
        ) and (layer % period != i % period):
            raise MergeError(
                f"{file}: layer {layer} of {path} would become layer {i}, which has another kind of attention: "
                f"move layers by multiples of {period}."
            )
    if types:
        config["layer_types"] = types
        config.pop("sliding_window_pattern", None)


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
    (folder / output.NAME).write_text(
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
