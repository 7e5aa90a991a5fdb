"""Compiles the full-size configurations of all papers for absent TPUs, and writes the tables.

  espalier precompile tables
  espalier precompile tables --rows code_mix_470m aya23_35b --again
  espalier precompile tables --list

Each row is compiled in a process of its own, one to six minutes on one core. Rows that docs/evidence/precompile_tables.json has from
the same definition and compiler are not compiled again; a stopped command continues where it was. Rows are in
ROWS of launch/papers/*/, with bounds of memory and of what is sent; a row that breaks them is named. A change of a row's
gin files compiles it again; after a change of model/ or trainers/, --again does.
Exit status: 1 if a chosen row has no report.
"""

import datetime
import json
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from espalier.common.bars import Bar
from espalier.launch import cli, environment
from espalier.launch.config.setting_flags import MANY, Folder, Name
from espalier.launch.precompile import apart, table_rows, tpu_topology
from espalier.launch.precompile.table_rows import Row

DOCS = pathlib.Path(environment.ROOT, "docs/evidence")
JSON, PAGE = "precompile_tables.json", "precompile_tables.md"


class RowError(ValueError):
    """An unknown row, or a file of reports that cannot be read."""


def _run(
    *,
    rows: Annotated[Sequence[Name], MANY] = (),
    again: bool = False,
    list: bool = False,
    page_only: bool = False,
    out: Folder | None = None,
    row_seconds: Annotated[float, "S"] = 1800,
    row_gb: Annotated[float, "GB"] = 12,
) -> int:
    """Compiles rows and writes the tables; returns the exit status.

    Args:
      rows: compile only these rows, in this order (default: all).
      again: also compile rows that have a result.
      list: only print the command of each row.
      page_only: compile nothing, and write the page from the JSON file.
      out: folder of the JSON file and the page (default: docs/evidence).
      row_seconds: seconds that a row may take.
      row_gb: memory in GB that a row may take on this machine.
    """
    tpu_topology.prepare_environment()
    tables = table_rows.rows()
    chosen = _chosen(tables, rows)
    if list:
        for row in chosen:
            print(f"# {row.name}: {row.title}\n{shlex.join(_command(row))}\n")
        return 0
    folder = pathlib.Path(out or DOCS)
    records = read(folder / JSON)
    if not page_only:
        if reason := tpu_topology.missing():
            raise tpu_topology.TopologyError(f"The tables need libtpu, but {reason}.")
        limits = apart.Limits(row_seconds, row_gb * 1e9)
        _compile(chosen, records, folder / JSON, limits, again=again)
    page = table_rows.page(tables, records)
    (folder / PAGE).write_text(page, encoding="utf-8")
    return int(any(records.get(row.name, {}).get("report") is None for row in chosen))


main = cli.command(__doc__, "precompile tables", _run, huge_pages=False)


def _chosen(tables: Mapping[str, Sequence[Row]], names: Sequence[str]) -> list[Row]:
    by_name = {row.name: row for table in tables.values() for row in table}
    if unknown := sorted(set(names) - set(by_name)):
        raise RowError(f"--rows names no row {unknown}: choose from {', '.join(by_name)}.")
    return [by_name[name] for name in names or by_name]


def _command(row: Row) -> list[str]:
    return ["python", "-m", "espalier.launch.precompile", *row.words]


def read(path: pathlib.Path) -> dict[str, Any]:
    """Returns the records of a file by row; {} without a file. Raises RowError for another kind of file."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["rows"].items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RowError(f"{path} is not a file of reports: {error}. Move or delete it.") from None


def _compile(
    rows: Sequence[Row],
    records: dict[str, Any],
    target: pathlib.Path,
    limits: apart.Limits,
    *,
    again: bool,
) -> None:
    """Compiles rows that have no report yet, and writes the records after each."""
    from espalier.launch.precompile import precompile

    versions = tpu_topology.versions()
    waiting = [
        row
        for row in rows
        if again
        or (record := records.get(row.name)) is None
        or record["report"] is None
        or record["digest"] != row.digest(versions)
    ]
    print(f"{len(rows) - len(waiting)} of {len(rows)} rows are there already", flush=True)
    with Bar(waiting, unit="row") as progress:
        for row in progress:

            def show(seconds: float, row: Row = row) -> None:
                progress.set_postfix_str(f"{row.name}: {seconds:.0f} s")

            outcome = apart.compile_apart(row.words, limits, waiting=show)
            records[row.name] = {
                "digest": row.digest(versions),
                "command": shlex.join(_command(row)),
                "compiled_on": datetime.date.today().isoformat(),
                "seconds": round(outcome.seconds),
                "problem": outcome.problem,
                "report": outcome.report,
            }
            precompile.write_json(target, {"rows": records})
            line = table_rows.summary(records[row.name])
            progress.write(f"{row.name}: {line}, {outcome.seconds:.0f} s")
            for problem in row.broken(outcome.report) if outcome.report else ():
                progress.write(f"{row.name} breaks what its row states: {problem}")


if __name__ == "__main__":
    raise SystemExit(main())
