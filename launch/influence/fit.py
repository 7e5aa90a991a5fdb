"""Fits the EK-FAC factors of a run on documents: covariances, their eigenvectors, and corrected eigenvalues.

Example, after a run in /tmp/espalier_tiny (see espalier train --help):

  espalier influence fit --checkpoint=/tmp/espalier_tiny --documents=d.jsonl --out=/tmp/factors

Documents are {"text": "..."} or {"tokens": [...]}, one in each line. A stopped fit continues when the same command runs again.
Some thousand documents of the model's training data are enough for small models; 100,000 are used for large ones. With
--checkpoints=DIR,DIR several checkpoints of a run have factors, in OUT/NAME each.
"""

import argparse
import dataclasses
import itertools
import pathlib
import time
from collections.abc import Sequence

from espalier.common.storage import paths
from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.config.setting_flags import Folder
from espalier.launch.inference import row_files
from espalier.launch.influence import checkpoints, inputs, outputs
from espalier.launch.influence.checkpoints import Several
from espalier.launch.load import load_run
from espalier.launch.load.load_run import LoadError, RunConfig
from espalier.trainers.influence.settings import FitSettings

RANKED = 64  # first documents that the table of dampings ranks
_SETTINGS = ("length", "batch_size", "sweep_documents")
_SOURCE = inputs.Source(max_documents=100_000)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    cli.take_addresses(parser, "documents", "out")
    setting_flags.add(load_run.add_flags(parser, required=False), Several, names=("checkpoints",))
    group = parser.add_argument_group("factors")
    setting_flags.add(group, fit, names=("out",))
    setting_flags.add(group, _SOURCE)
    setting_flags.add(group, FitSettings)
    setting_flags.add(group, fit, names=_SETTINGS)


def _default_files(flags: argparse.Namespace) -> Sequence[str]:
    several = Several(**setting_flags.given(flags, Several))
    flags.checkpoint = checkpoints.first(several, flags.checkpoint)
    return load_run.default_files(flags)


def _run(start: cli.Start) -> None:
    flags = start.flags
    several = Several(**setting_flags.given(flags, Several))
    source = dataclasses.replace(_SOURCE, **setting_flags.given(flags, inputs.Source))
    source.import_mixtures()
    places = several.checkpoints or [flags.checkpoint]
    folders = several.folders(flags.out) if several.checkpoints else [flags.out]
    config = start()
    for checkpoint, out in zip(places, folders, strict=True):
        fit(
            config,
            checkpoint=checkpoint,
            out=out,
            params=flags.params,
            source=source,
            settings=FitSettings(**setting_flags.given(flags, FitSettings)),
            **setting_flags.given(flags, fit, _SETTINGS),
        )


def fit(
    config: RunConfig,
    *,
    checkpoint: str,
    out: Folder,
    source: inputs.Source,
    settings: FitSettings,
    params: str = "auto",
    length: int | None = None,
    batch_size: int = 8,
    sweep_documents: int = 32,
) -> None:
    """Fits factors into the folder `out`, or continues there.

    Args:
      config: configuration of the checkpoint's run.
      checkpoint: step or run directory, or a Hugging Face directory.
      out: write the factors to this folder.
      source: the documents.
      settings: what factors depend on.
      params: see launch/load/load_run.py.
      length: tokens of each document that are used; by default all of a sequence, or the first 512 of a document if the model has as many positions.
      batch_size: number of documents in a batch.
      sweep_documents: so many of the first 64 documents are ranked for their own second halves with several dampings, in a
        table at the end; 0 for no table.

    Raises:
      LoadError: settings or rows that do not fit the model, or a folder with other factors.
    """
    import jax

    from espalier.trainers.influence import files, sweep
    from espalier.trainers.influence import fit as stages
    from espalier.trainers.influence import sites as site_list

    if settings.seed and settings.labels == "empirical":
        raise LoadError("--seed is of sampled labels, and --labels=empirical has none: remove it.")
    row_files.check_folder(out)
    if not 0 <= sweep_documents <= RANKED:
        raise LoadError(f"--sweep_documents={sweep_documents} must be from 0 to {RANKED}.")
    outputs.check_float64(settings.factor_dtype)
    with (
        config.load(checkpoint, params=params, encoder_decoders=True) as run,
        outputs.opened(out, without=stages.UNFINISHED) as (path, push),
    ):
        sites = site_list.select(run.model, run.params, settings.modules)
        documents = source.of(run, source.length(run, length))
        record = {
            "checkpoint": load_run.place(checkpoint),
            "params": params,
            "model": files.model_digest(run.params),
            "settings": settings.record(),
            "length": documents.length,
            "batch_size": run.batch_size(batch_size, documents.limit or 1 << 30),
            "documents": documents.record(),
            "sites": {path: [s.inputs, s.outputs, list(s.lead)] for path, s in sites.items()},
        }
        folder = pathlib.Path(path)
        outputs.begin(folder, record, out=out)
        sample = [*itertools.islice(iter(documents), outputs.SAMPLED)]
        if jax.process_index() == 0:
            inputs.write_sample(folder / outputs.SAMPLE, sample)
        reader = stages.Reader(
            model=run.model,
            params=run.params,
            batch_size=record["batch_size"],
            sharding=run.row_sharding,
        )
        began = time.perf_counter()
        push()
        stages.fit(reader, folder, lambda: documents, settings, total=documents.count(), saved=push)
        experts = stages.tokens_of_experts(folder, sites)
        ranked = sample[:RANKED]
        recalls = sweep.recalls(
            *(reader, folder, sites, ranked),
            asked=sweep_documents,
            dtype=settings.sum_dtype,
            precision=settings.precision,
        )
        seconds = time.perf_counter() - began
        count = files.read_record(folder / "squares")
    if jax.process_index() == 0:
        for note in documents.notes():
            print(note)
        if approximated := site_list.blocked_head(sites, settings.blocks):
            print(approximated)
        for path, (fewest, most) in experts.items():
            print(f"{path}: {fewest:,} to {most:,} tokens an expert")
        print(
            f"factors of {len(sites)} matrices ({site_list.weights(sites):,} weights) from {count['documents']:,} documents, "
            f"{count['tokens']:,} tokens, in {seconds:.1f} s: {paths.absolute(out)}"
        )
        for line in sweep.table(recalls, len(ranked)):
            print(line)


main = load_run.command(__doc__, "influence fit", _run, _add_flags, files=_default_files)

if __name__ == "__main__":
    raise SystemExit(main())
