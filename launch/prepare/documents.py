"""Filters documents, drops near-duplicates, and writes the rest as shards of JSON lines with the counts of what was dropped.

Example, web pages without near-duplicates, and without text of an evaluation set (another gin file binds further filters):

  espalier prepare documents --gin.FILES='"/data/web/*.jsonl.zst"' --gin.OUTPUT='"/data/clean"'
  espalier prepare documents --gin_file=my_filters.gin --gin.FILES='"/data/web/*.parquet"' --gin.OUTPUT='"/data/clean"'

  # my_filters.gin
  from __gin__ import dynamic_registration
  from espalier.data.text import decontamination
  from espalier.launch.prepare import documents
  documents.prepare_documents.filters = [@decontamination.Overlap()]
  decontamination.Overlap.evaluation_set = '/data/eval/test.jsonl'

Files are JSON lines, text, Parquet or Arrow. A row is {"id", "text"} and the keys in KEYS. OUTPUT, a folder or an address of an
object store, gets shards (00000.jsonl.zst, ...) in the order of the files, and `counts.json` once it is complete. The same
command goes on after an interruption.

With --beam_pipeline_options, Apache Beam does the work on a cluster, with the same result:

  espalier prepare documents --gin.FILES=... --gin.OUTPUT='"gs://BUCKET/clean"' \\
    --beam_pipeline_options=--runner=DataflowRunner,--project=PROJECT,--region=REGION,--temp_location=gs://BUCKET/tmp
"""

import os
from collections.abc import Sequence
from typing import Any

from espalier.common.ranges import Resemblance
from espalier.common.storage import paths
from espalier.data.clean import documents
from espalier.data.clean.documents import Cleaning
from espalier.data.data_source import Patterns
from espalier.data.text import document_files
from espalier.data.text.document_filters import DocumentFilter
from espalier.data.text.row_files import OnBadRow
from espalier.launch import cli
from espalier.launch.prepare import workers


def prepare_documents(
    *,
    files: Patterns,
    output: str,
    filters: Sequence[DocumentFilter] = (),
    near_duplicates: Resemblance | None = 0.8,
    text_key: str | Sequence[str] = "text",
    id_key: str | None = None,
    document_per: str = "file",
    on_bad_row: OnBadRow = "error",
    keys: Sequence[str] = (),
    cache_dir: str | os.PathLike | None = None,
    beam_options: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes the documents that stay, and prints and returns how many were read, dropped and kept.

    Args:
      files: one or several globs; the order of the files, by name, decides which of several near-duplicates comes first.
      output: folder or address of the shards; empty, or of the same command.
      filters: applied in order; each keeps or drops a document by text and metadata.
      near_duplicates: share of shingles from which on two documents are near-duplicates (`data.text.dedup`), at least 0.5; the first is kept.
        None keeps them.
      text_key, id_key, document_per: see `data.text.documents.Format`.
      on_bad_row: what a row is that cannot be used: an 'error', or left out, counted and listed in bad_rows.jsonl ('skip').
      keys: further keys or columns that rows keep.
      cache_dir: root of the caches; default $ESPALIER_CACHE or ~/.cache/espalier.
      beam_options: of a pipeline of Apache Beam, instead of the processes.

    Raises:
      FileNotFoundError: a pattern matches no file.
      ValueError: the files, the output or a setting cannot be used.
      PipelineError: the pipeline failed.
    """
    if isinstance(files, dict):
        raise ValueError(
            "FILES is several sets by name: give one or several globs, and call once for each set"
        )
    source = document_files.find(
        name="documents",
        files=files,
        validation_fraction=0.0,
        text_key=text_key,
        id_key=id_key,
        document_per=document_per,
        filters=filters,
        on_bad_row=on_bad_row,
        cache_dir=cache_dir,
    )
    assert isinstance(source, document_files.DocumentFiles)
    cleaning = Cleaning(
        source=source,
        shards=documents.shards_of(source),
        output=paths.absolute(output),
        keys=tuple(keys),
        threshold=near_duplicates,
    )
    counts = cleaning.run(beam_options)
    rows = [("read", counts["read"])]
    rows += [(f"dropped: {name}", count) for name, count in sorted(counts["dropped"].items())]
    for name, count in [*rows, ("kept", counts["kept"])]:
        print(f"{name:40s} {count['documents']:12,d} documents {count['bytes'] / 1e6:12,.1f} MB")
    if skipped := counts.get("bad_rows"):
        print(
            f"{skipped['rows']:,} rows cannot be used: {paths.join(cleaning.output, documents.BAD_ROWS)}"
        )
    print(f"{cleaning.output}: {len(cleaning.shards):,} shards")
    return counts


main = cli.gin_command(
    __doc__,
    "espalier.launch.prepare.documents:prepare_documents",
    command="prepare documents",
    extra_flags=workers.add_flags,
    run=workers.used(lambda start: start(beam_options=start.flags.beam_pipeline_options)),
    default_files=lambda flags: ["t5x_configs/runs/documents.gin"],
)

if __name__ == "__main__":
    raise SystemExit(main())
