"""Fits the EK-FAC factors of a run on documents: covariances, their eigenvectors, and corrected eigenvalues.

Example, after a run in /tmp/espalier_tiny (see python -m launch.train --help):

  python -m launch.influence fit --checkpoint=/tmp/espalier_tiny --documents=d.jsonl --out=/tmp/factors

Documents are {"text": "..."} or {"tokens": [...]}, one in each line. A stopped fit continues when the same command runs again.
Some thousand documents of the model's training data are enough for small models; 100,000 are used for large ones.
"""

import argparse
import itertools
import pathlib
import time
from collections.abc import Sequence
from typing import Any, Literal

from espalier.common.storage import paths
from launch import cli
from launch.attribution import factors as factor_files
from launch.attribution import inputs, outputs
from launch.config import setting_flags
from launch.inference import row_files
from launch.run import load_run
from launch.run.load_run import LoadError, RunConfig

SAMPLE, RANKED = (
    1024,
    64,
)  # first documents that `ekfac_cg` may take, and that the table of dampings ranks
_SETTINGS = ("labels", "blocks", "factor_dtype", "precision", "seed", "length", "max_documents")
_SETTINGS += ("batch_size", "sweep_documents")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return cli.main(
        __doc__,
        entry="launch.run.load_run:RunConfig",
        command="influence fit",
        extra_flags=_add_flags,
        run=_run,
        default_files=load_run.default_files,
        unused={"VOCABULARY": "None"},
        argv=argv,
    )


def _add_flags(parser: argparse.ArgumentParser) -> None:
    cli.take_addresses(parser, "documents", "out")
    load_run.add_flags(parser)
    group = parser.add_argument_group("factors")
    group.add_argument("--out", required=True, metavar="DIR", help="folder of the factors")
    add_document_flags(group)
    group.add_argument(
        "--modules",
        default="mlp",
        metavar="NAMES",
        help="layers, with commas: mlp (default), attention, adapters, head, all, or patterns of whole paths",
    )
    setting_flags.add(group, fit, names=_SETTINGS)


def add_document_flags(group: Any) -> None:
    """Adds the flags that name documents."""
    group.add_argument("--documents", metavar="FILE", help="JSON lines, also .gz and .zst")
    group.add_argument(
        "--mixture", metavar="NAME", help="SeqIO mixture or task, in place of a file"
    )
    group.add_argument("--split", default="train", metavar="NAME", help="of it (default train)")
    group.add_argument(
        "--module",
        action="append",
        default=[],
        metavar="NAME",
        help="module to import that registers mixtures; repeatable",
    )


def import_mixtures(flags: argparse.Namespace) -> None:
    """Imports the modules of --module, if --mixture is set; raises LoadError for flags of a mixture without one."""
    if flags.mixture is None:
        for name, unset in (("module", []), ("split", "train")):
            if getattr(flags, name) != unset:
                raise LoadError(
                    f"--{name} is of a mixture: add --mixture=NAME, or remove --{name}."
                )
        return
    from data import cpu_tensorflow
    from data.text import user_data

    cpu_tensorflow.load()
    for module in flags.module:
        user_data.import_mixtures(module=module)


def _run(start: cli.Start) -> None:
    flags = start.flags
    import_mixtures(flags)
    names = ("checkpoint", "params", "out", "documents", "mixture", "split")
    fit(
        start(),
        **{name: getattr(flags, name) for name in names},
        modules=flags.modules.split(","),
        **setting_flags.given(flags, fit, _SETTINGS),
    )


def fit(
    config: RunConfig,
    *,
    checkpoint: str,
    out: str,
    params: str = "auto",
    documents: str | None = None,
    mixture: str | None = None,
    split: str = "train",
    modules: Sequence[str] = ("mlp",),
    labels: Literal["sampled", "empirical"] = "sampled",
    blocks: int = 1,
    factor_dtype: Literal["float32", "float64", "bfloat16"] = "float32",
    precision: Literal["highest", "high", "default"] = "highest",
    seed: int = 0,
    length: int | None = None,
    max_documents: int = 100_000,
    batch_size: int = 8,
    sweep_documents: int = 32,
) -> None:
    """Fits factors into the folder `out`, or continues there.

    Args:
      config: configuration of the checkpoint's run.
      checkpoint: step or run directory, or a Hugging Face directory.
      out: folder of the factors.
      params: see launch/run/load_run.py.
      documents: JSON lines.
      mixture: name of a SeqIO mixture in place of a file.
      split: split of the mixture.
      modules: names or patterns of layers.
      labels: labels of the curvature: sampled from the model, or the documents' own tokens (empirical).
      blocks: diagonal blocks of each covariance; more need less memory.
      factor_dtype: dtype of the factors; bfloat16 stores eigenvectors only, sums stay in float32.
      precision: of products in the eigenbasis on accelerators; default rounds them to bfloat16 on TPUs and to 10 bits on GPUs.
      seed: seed of the sampled labels.
      length: tokens that are read of each document; 512, or the model's positions if fewer, if not set.
      max_documents: number of first documents that are used.
      batch_size: documents at a time.
      sweep_documents: so many of the first 64 documents are ranked for their own second halves with several dampings, in a
        table at the end; 0 for no table.

    Raises:
      LoadError: settings or rows that do not fit the model, or a folder with other factors.
    """
    import jax

    from trainers.influence import files, sweep
    from trainers.influence import fit as stages
    from trainers.influence import sites as site_list

    if seed and labels == "empirical":
        raise LoadError("--seed is of sampled labels, and --labels=empirical has none: remove it.")
    row_files.check_folder(out)
    if not 0 <= sweep_documents <= RANKED:
        raise LoadError(f"--sweep_documents={sweep_documents} must be from 0 to {RANKED}.")
    settings = stages.FitSettings(
        modules=tuple(modules),
        labels=labels,
        blocks=blocks,
        factor_dtype=factor_dtype,
        seed=seed,
        precision=precision,
    )
    factor_files.check_float64(factor_dtype)
    with (
        config.load(checkpoint, params=params, encoder_decoders=True) as run,
        outputs.opened(out, without=stages.UNFINISHED) as (path, push),
    ):
        sites = site_list.select(run.model, run.params, settings.modules)
        source = inputs.Documents(
            run=run,
            length=inputs.length_of(run, length),
            path=documents,
            mixture=mixture,
            split=split,
            limit=max_documents,
        )
        record = {
            "checkpoint": load_run.place(checkpoint),
            "params": params,
            "model": files.model_digest(run.params),
            "settings": settings.record(),
            "length": source.length,
            "batch_size": run.batch_size(batch_size, max_documents),
            "documents": source.record(),
            "sites": {path: [s.inputs, s.outputs, list(s.lead)] for path, s in sites.items()},
        }
        folder = pathlib.Path(path)
        factor_files.begin(folder, record, out=out)
        sample = [*itertools.islice(iter(source), SAMPLE)]
        if jax.process_index() == 0:
            inputs.write_sample(folder / factor_files.SAMPLE, sample)
        reader = stages.Reader(
            model=run.model,
            params=run.params,
            batch_size=record["batch_size"],
            sharding=run.row_sharding,
        )
        began = time.perf_counter()
        push()
        stages.fit(reader, folder, lambda: source, settings, total=source.count(), saved=push)
        experts = stages.tokens_of_experts(folder, sites)
        ranked = sample[:RANKED]
        recalls = sweep.recalls(
            *(reader, folder, sites, ranked),
            asked=sweep_documents,
            dtype=settings.sum_dtype,
            precision=precision,
        )
        seconds = time.perf_counter() - began
        count = files.read_record(folder / "squares")
    if jax.process_index() == 0:
        for note in source.notes():
            print(note)
        for path, (fewest, most) in experts.items():
            print(f"{path}: {fewest:,} to {most:,} tokens an expert")
        print(
            f"factors of {len(sites)} matrices ({site_list.weights(sites):,} weights) from {count['documents']:,} documents, "
            f"{count['tokens']:,} tokens, in {seconds:.1f} s: {paths.absolute(out)}"
        )
        for line in sweep.table(recalls, len(ranked)):
            print(line)


if __name__ == "__main__":
    raise SystemExit(main())
