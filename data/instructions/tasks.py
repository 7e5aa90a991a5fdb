"""SeqIO tasks of datasets with prompt templates: one task for each template, and a mixture with caps on sizes."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.common import spelling
from espalier.common.ranges import Fraction, Positive, check_choice
from espalier.common.storage import paths
from espalier.data import tasks
from espalier.data.cache import cache_dir as cache
from espalier.data.instructions import ranking
from espalier.data.instructions.sources import (
    Encoding,
    Form,
    InstructionFiles,
    InstructionTfds,
    Tokeniser,
)
from espalier.data.instructions.templates import Template, read
from espalier.data.rows import columns as column_names
from espalier.data.rows.columns import Columns
from espalier.data.text import documents, hf_datasets
from espalier.data.text.documents import DataError
from espalier.data.text.row_files import OnBadRow
from espalier.data.text.tfds_source import TfdsSource

ORIGIN = "register_instructions"
SCORED = "_score_eval"  # ends the names of tasks for ranking
Source = InstructionFiles | InstructionTfds


def register_instructions(
    *,
    name: str,
    data_dir: str,
    train: Mapping[str, Sequence[str]],
    vocabulary: Any,
    form: Form,
    held_out: Mapping[str, Sequence[str]] | None = None,
    templates_dir: str | None = None,
    tfds_sets: Mapping[str, str] | None = None,
    hf_sets: Mapping[str, str] | None = None,
    columns: Mapping[str, Columns] | None = None,
    cap: Positive | None = 500_000,
    validation_fraction: Fraction = 0.0,
    separator: str = "\n",
    add_bos: bool | None = None,
    inputs_eos: bool = True,
    on_bad_row: OnBadRow = "error",
    cache_dir: str | os.PathLike | None = None,
) -> None:
    r"""Registers a task for each template of each dataset, and the mixture `name` of those that are trained.

    The rows of a set, such as `super_glue/rte`, are the files `train.*`, `train-*` or `train_*`, and so of `validation` (JSON lines, also .gz and
    .zst, or Parquet) in the folder `data_dir/super_glue/rte`. Its templates are in
    `templates_dir/super_glue/rte/templates.yaml`, or in the folder above, such as `anli` for `anli/r1`;
    `data.instructions.templates` describes them. Tasks are called after set and template:
    `super_glue_rte_does_this_imply`. A set for evaluation is never trained: its tasks end with `_score_eval`, and have
    an example for each answer choice of a row.

    The rates are T0's (arXiv 2110.08207): the number of examples, but for sets with more than `cap` rows, cap divided
    by the number of templates. They are multiplied by the mean number of target tokens, because streams treat
    rates as shares of tokens.

    Args:
      name: name of the mixture.
      data_dir: directory of rows.
      train: category -> its sets.
      vocabulary: a SeqIO vocabulary.
      form: 'encoder_decoder' for the features `inputs` and `targets`; 'decoder' for `targets` with both, and
        `loss_weights`, which are 1 for tokens of the answer.
      held_out: evaluated task -> its sets, whose results are averaged; only templates with answer choices and
        metadata `original_task: true` are evaluated.
      templates_dir: directory of templates; None for `data_dir`.
      tfds_sets: set -> name, config and version of a prepared TFDS set, instead of files; `data_dir` has it.
      hf_sets: set -> a data set of Hugging Face, instead of files: a folder of `save_to_disk`, or an address of the hub; see
        `data.text.hf_datasets`.
      columns: set -> {key that its templates read: column of its files}; see `data.rows.columns`.
      cap: greatest number of rows of a set that counts fully; None for no limit.
      validation_fraction: share of the rows to hold out from sets without files `validation*`; the same rows for all
        templates.
      separator: between input and answer of a decoder.
      add_bos: begin a decoder's input with BOS; None: if the tokenizer does.
      inputs_eos: end the inputs of an encoder with EOS. T0 was trained without.
      on_bad_row: what a row of files is that is no JSON object: an 'error', or left out, counted and listed ('skip').
      cache_dir: directory of remembered checksums and counts; default $ESPALIER_CACHE or ~/.cache/espalier.

    Raises:
      FileNotFoundError: a set has no rows or no templates.
      DataError: templates or rows are malformed; names file, template and row.
      ValueError: a set is trained and held out or named twice, two tasks would have one name, or the vocabulary lacks
        EOS or BOS.
    """
    check_choice("form", form, Form)
    held_out = held_out or {}
    _check_sets(name, train, held_out)
    if add_bos is None:
        add_bos = form == "decoder" and getattr(vocabulary, "adds_bos", False)
    tasks.check_special_ids(name, vocabulary, add_bos=add_bos, add_eos=True)
    _check_origins(name, train, held_out, tfds_sets or {}, hf_sets or {}, columns or {})
    sets = _Sets(
        data_dir=_expanded(data_dir),
        templates_dir=_expanded(templates_dir or data_dir),
        tfds_sets=tfds_sets or {},
        hf_sets=hf_sets or {},
        columns=columns or {},
        tokeniser=Tokeniser(vocabulary, form, separator, add_bos, inputs_eos),
        validation_fraction=validation_fraction,
        on_bad_row=on_bad_row,
        cache_dir=cache_dir,
    )
    sources: list[tuple[Source, dict[str, str]]] = []
    rates: dict[str, float] = {}
    for category, names in train.items():
        for each in names:
            trained = [sets.source(each, x, ranking=False) for x in sets.templates(each)]
            sources += [(source, {"category": category, "set": each}) for source in trained]
            rates |= _rates(trained, cap)
    for task, names in held_out.items():
        for each in names:
            templates = _evaluated(sets.templates(each))
            ranked = [sets.source(each, x, ranking=True) for x in templates]
            sources += [(source, {"held_out": task, "set": each}) for source in ranked]
    _check_names(name, sources)
    for source, facts in sources:
        _register(source, facts)
    if rates:
        tasks.register_mixture(name, rates)


def _check_sets(
    name: str, train: Mapping[str, Sequence[str]], held_out: Mapping[str, Sequence[str]]
) -> None:
    if not train and not held_out:
        raise ValueError(f"{name}: train and held_out name no set; name at least one")
    owners: dict[str, str] = {}
    for argument, groups in (("train", train), ("held_out", held_out)):
        for group, sets in groups.items():
            if isinstance(sets, str) or not sets:
                raise ValueError(f"{name}: {argument}[{group!r}] is {sets!r}; write a list of sets")
            for each in sets:
                owner = f"{argument}[{group!r}]"
                if owners.setdefault(each, owner) != owner or list(sets).count(each) > 1:
                    raise ValueError(
                        f"{name}: the set {each!r} is in {owners[each]} and in {owner}; remove one"
                    )


def _check_origins(
    name: str,
    train: Mapping[str, Sequence[str]],
    held_out: Mapping[str, Sequence[str]],
    tfds_sets: Mapping[str, str],
    hf_sets: Mapping[str, str],
    columns: Mapping[str, Columns],
) -> None:
    known = {each for groups in (train, held_out) for names in groups.values() for each in names}
    named = {"tfds_sets": tfds_sets, "hf_sets": hf_sets, "columns": columns}
    for argument, by_set in named.items():
        for each in by_set:
            if each not in known:
                raise ValueError(
                    f"{name}: {argument} names the set {each!r}, which neither train nor held_out has; "
                    f"{spelling.nearest(each, sorted(known))}"
                )
            if each in tfds_sets and by_set is not tfds_sets:
                raise ValueError(
                    f"{name}: {argument} and tfds_sets name the set {each!r}, and TFDS has its own rows; remove one"
                )
    for each, chosen in columns.items():
        column_names.check(f"{name}, {each}", chosen)


def _check_names(name: str, sources: Sequence[tuple[Source, Mapping[str, str]]]) -> None:
    owners: dict[str, str] = {}
    for source, facts in sources:
        if (other := owners.setdefault(source.name, facts["set"])) != facts["set"]:
            raise ValueError(
                f"{name}: the sets {other!r} and {facts['set']!r} would both have a task {source.name!r}; rename a folder "
                "or a template"
            )


def _register(source: Source, facts: Mapping[str, Any]) -> None:
    encoding = source.encoding
    vocabulary = encoding.tokeniser.vocabulary
    vocabularies = {"loss_weights": None}
    ranked = {"postprocess_fn": ranking.option, "metric_fns": [ranking.accuracies]}
    tasks.register_rows(
        source,
        origin=ORIGIN,
        features={
            feature: vocabularies.get(feature, vocabulary)
            for feature in encoding.features
            if feature in ("inputs", "targets", "loss_weights")
        },
        facts={"template": encoding.template.name, **facts, **encoding.tokeniser.facts},
        **(ranked if encoding.ranking else {}),
    )


def _rates(sources: Sequence[Source], cap: float | None) -> dict[str, float]:
    """Returns {task: rate} of a set; see `register_instructions`."""
    counts = {source.name: source.num_input_examples("train") for source in sources}
    is_large = cap is not None and max(counts.values()) > cap
    return {
        source.name: (min(count, cap / len(sources)) if is_large else count)
        * (source.tokens("train") / count)
        for source, count in zip(sources, counts.values(), strict=True)
    }


def _evaluated(every: Sequence[Template]) -> list[Template]:
    chosen = [each for each in every if each.original_task and each.answer_choices]
    if not chosen:
        raise DataError(
            f"{every[0].file}: no template has 'answer_choices' and 'original_task: true' in its metadata, as ranking "
            "needs"
        )
    return chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sets:
    """Where sets are, and how they are read; the fields are arguments of `register_instructions`."""

    data_dir: pathlib.Path
    templates_dir: pathlib.Path
    tfds_sets: Mapping[str, str]
    hf_sets: Mapping[str, str]
    columns: Mapping[str, Columns]
    tokeniser: Tokeniser
    validation_fraction: float
    on_bad_row: OnBadRow
    cache_dir: str | os.PathLike | None

    def templates(self, name: str) -> tuple[Template, ...]:
        """Returns the templates of a set."""
        folder = self.templates_dir / name
        paths = [folder / "templates.yaml", folder.parent / "templates.yaml"]
        for path in paths:
            if path.is_file():
                return read(path)
        known = self.templates_dir.glob("**/templates.yaml")
        sets = [str(path.parent.relative_to(self.templates_dir)) for path in known]
        hint = spelling.nearest(name, sets)
        raise FileNotFoundError(
            f"The set {name!r} has no templates: neither {paths[0]} nor {paths[1]} exists"
            f"{f' ({hint})' if hint.startswith('did') else ''}. Copy promptsource's templates.yaml there, or set templates_dir"
        )

    def source(self, name: str, template: Template, *, ranking: bool) -> Source:
        """Returns the source of the task of a set and a template; with `ranking`, of the validation rows' choices."""
        task = f"{_slug(name)}_{template.slug}{SCORED if ranking else ''}"
        encoding = Encoding(template, self.tokeniser, ranking)
        wanted = ("validation",) if ranking else ("train", "validation")
        if name in self.tfds_sets:
            rows = self._tfds(self.tfds_sets[name], wanted)
            return InstructionTfds(name=task, rows=rows, encoding=encoding)
        files = {split: self._files(name, split) for split in wanted}
        fraction = 0.0
        if not files[wanted[0]]:
            raise FileNotFoundError(
                f"The set {name!r} has no rows: no file {self.data_dir / name}/{wanted[0]}* exists. Write one as "
                "JSON lines or Parquet, or set tfds_sets"
            )
        if not files["validation"]:
            del files["validation"]
            if self.validation_fraction:
                fraction, files["validation"] = self.validation_fraction, files["train"]
        return InstructionFiles.of(
            task,
            files,
            validation_fraction=fraction,
            on_bad_row=self.on_bad_row,
            cache_dir=self.cache_dir,
            encoding=encoding,
            columns=self.columns.get(name),
        )

    def _files(self, name: str, split: str) -> list[str]:
        if name in self.hf_sets:
            origin = self.hf_sets[name]
            if not hf_datasets.is_address(origin) and not paths.is_remote(origin):
                origin = str(_expanded(origin))
            is_there = split == "train" or hf_datasets.has_split(origin, split)
            return hf_datasets.files(origin, split) if is_there else []
        found = [path for path in (self.data_dir / name).glob(f"{split}*") if path.is_file()]
        for path in found:
            if not re.match(rf"{split}[-_.]", path.name):
                raise DataError(
                    f"{path}: the rows of a set are in files such as {split}.jsonl and {split}-0.jsonl, and this name is none: rename "
                    "it, or move it away"
                )
            documents.check_suffix(path)
        return sorted(map(str, found))

    def _tfds(self, tfds_name: str, wanted: Sequence[str]) -> TfdsSource:
        source = TfdsSource(
            tfds_name=tfds_name,
            text_key=None,
            wanted_splits=None,
            data_dir=str(self.data_dir),
            cache=str(cache.cache_dir("files", override=self.cache_dir)),
        )
        splits = {split: split for split in wanted if split in source.split_map}
        if wanted[0] not in splits:
            raise ValueError(f"TFDS set {tfds_name!r} has no split {wanted[0]!r}; remove the set")
        source = dataclasses.replace(source, wanted_splits=splits)
        source.check()
        return source


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_")


def _expanded(path: str) -> pathlib.Path:
    return pathlib.Path(os.path.abspath(os.path.expandvars(os.path.expanduser(path))))
