"""Tables of full-size configurations: their rows resolve, the command continues, and the page shows what is stored."""

import dataclasses
import json

import pytest

from espalier.launch.config import gin_config
from espalier.launch.precompile import apart, table_rows, tables, tpu_topology

TABLES = table_rows.rows()
ROWS = [row for table in TABLES.values() for row in table]
BAM = next(row for row in ROWS if row.name == "bam_4x590m")
UNUSED = {"MODEL_DIR": "''", "MIXTURE_OR_TASK_NAME": "''", "TASKS": "()"}
VERSIONS = {"jax": "1", "jaxlib": "1", "libtpu": "1"}


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_a_row_resolves_to_a_run_on_its_chips(row):
    config = gin_config.load(
        row.files, row.bindings, entry="espalier.launch.train:train", unused=UNUSED
    )
    recipe = config.arguments()["recipe"]
    chips = tpu_topology.parse(row.topology).num_chips
    from espalier.launch.precompile import candidates

    assert recipe.batch_size % candidates.batch_unit(recipe, tpu_topology.parse(row.topology)) == 0
    assert chips > 1


def test_all_papers_and_sizes_have_rows():
    assert set(TABLES) == set(table_rows.TITLES)
    names = {row.name for row in ROWS}
    assert {
        "code_mix_470m",
        "aya23_8b",
        "aya23_35b_lora",
        "bam_4x590m",
        "bam_2b",
        "bam_4x2b",
        "nexus_6x470m",
        "nexus_4x2p8b_extended",
    } < names
    assert {
        "t5_11b_mov30",
        "t5_3b_molora10",
        "t5_770m_full",
        "dpo_8b",
        "ekfac_7b",
        "ekfac_35b",
        "decode_128k_full",
        "decode_128k_snapkv",
        "wrn28_10",
        "resnet50",
    } < names
    assert len({tpu_topology.parse(row.topology).generation for row in ROWS}) == 4


def report(**changed):
    return {
        "program": "train",
        "per": "step",
        "topology": "v5e:4x4",
        "mesh": {"data": 1, "fsdp": 4, "tensor": 4},
        "rules": "fsdp_tp",
        "remat": "full",
        "batch_size": 16,
        "length": 2048,
        "unit": "tokens",
        "fits": True,
        "hbm_available_bytes": 16.9e9,
        "hbm_bytes": {"peak": 5.5e9},
        "flops": {"compiled": 100e12, "analytic": 75e12},
        "collectives": {
            "all-gather": {"count": 12, "bytes": 3e9},
            "between-slices all-reduce": {"count": 2, "bytes": 1e9},
        },
        "roofline_seconds": {
            **{"step": 0.5, "step_one_ring": 1.25, "bound_by": "links"},
            **{"mfu_bound": 0.76, "mfu_bound_one_ring": 0.3},
            **{"compute": 0.4, "hbm": 0.1, "links": 0.5, "one_ring": 1.25, "network": 0.3},
        },
        "versions": VERSIONS,
        **changed,
    }


def fake(monkeypatch, outcome):
    compiled = []

    def compile_apart(words, limits, *, waiting):
        compiled.append(words)
        waiting(1.0)
        return outcome(len(compiled))

    monkeypatch.setattr(apart, "compile_apart", compile_apart)
    monkeypatch.setattr(tpu_topology, "missing", lambda: "")
    monkeypatch.setattr(tpu_topology, "versions", lambda: VERSIONS)
    return compiled


def run(folder, *flags):
    return tables.main([f"--out={folder}", *flags])


def test_the_command_continues_and_says_what_failed(tmp_path, monkeypatch):
    outcomes = [
        apart.Outcome(report(), "", 61.0),
        apart.Outcome(None, "stopped after 9 s, the limit of time", 9.0, stopped=True),
        apart.Outcome(report(fits=False, flops=None, roofline_seconds=None), "", 3.0),
    ]
    compiled = fake(monkeypatch, lambda n: outcomes[min(n, 3) - 1])
    chosen = ["--rows", "code_mix_2p8b", "code_mix_470m"]
    assert run(tmp_path, *chosen) == 1
    page = (tmp_path / tables.PAGE).read_text()
    assert (
        "| 2.8B, pre-training, the paper's recipe (`code_mix_2p8b`) | v5e:16x16 | fsdp 4 x tensor 4,"
        in page
    )
    assert "stopped after 9 s" in page and "12: 3 GB" in page
    # The row without a report is compiled again, the other is not.
    assert run(tmp_path, *chosen) == 0
    assert [words[0] for words in compiled] == [compiled[0][0]] * 3 and len(compiled) == 3
    assert "does not fit" in (tmp_path / tables.PAGE).read_text()
    assert run(tmp_path, *chosen, "--again") == 0 and len(compiled) == 5
    stored = json.loads((tmp_path / tables.JSON).read_text())["rows"]
    assert "--topology=v5e:16x16" in stored["code_mix_470m"]["command"]


def test_a_row_of_another_compiler_is_compiled_again(tmp_path, monkeypatch):
    compiled = fake(monkeypatch, lambda n: apart.Outcome(report(), "", 1.0))
    run(tmp_path, "--rows", "dpo_8b")
    monkeypatch.setattr(tpu_topology, "versions", lambda: {**VERSIONS, "jax": "2"})
    run(tmp_path, "--rows", "dpo_8b")
    assert len(compiled) == 2


def cells_of_a_line(digest):
    row = BAM
    page = table_rows.page(
        {"bam": [row]}, {row.name: {"digest": digest, "report": report()}}
    ).splitlines()
    (line,) = [line for line in page if line.startswith("| BAM of four 590M")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_line_of_the_page():
    assert "an earlier configuration" in cells_of_a_line("")[0]
    cells = cells_of_a_line(BAM.digest(VERSIONS))
    assert cells[0] == "BAM of four 590M seeds (`bam_4x590m`)"
    assert cells[2:] == [
        "fsdp 4 x tensor 4, `fsdp_tp`, remat full",
        "16 x 2,048",
        "5.50 of 16.9 GB",
        "100 T (75%)",
        "3 GB + 1 GB",
        "500 ms to 1.25 s (links)",
        "76% to 30%",
    ]


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}'])
def test_a_damaged_file_is_named(tmp_path, monkeypatch, capsys, text):
    fake(monkeypatch, lambda n: apart.Outcome(report(), "", 1.0))
    (tmp_path / tables.JSON).write_text(text)
    assert run(tmp_path, "--rows", "dpo_8b") == 2
    assert "precompile_tables.json is not a file of reports" in capsys.readouterr().err


def test_an_unknown_row_is_named(tmp_path, capsys):
    assert run(tmp_path, "--rows", "dpo_9b") == 2
    assert (
        "--rows names no row ['dpo_9b']: choose from llama2_7b_v5e_4x4" in capsys.readouterr().err
    )


def test_the_stored_page_is_that_of_the_stored_numbers():
    records = tables.read(tables.DOCS / tables.JSON)
    page = (tables.DOCS / tables.PAGE).read_text(encoding="utf-8")
    assert records and page == table_rows.page(TABLES, records)
    assert set(records) <= {row.name for row in ROWS}


def test_stored_rows_are_what_their_rows_state():
    records = tables.read(tables.DOCS / tables.JSON)
    by_name = {row.name: row for row in ROWS}
    reports = {name: record["report"] for name, record in records.items() if record["report"]}
    assert reports and not {n: b for n, one in reports.items() if (b := by_name[n].broken(one))}


def test_rows_say_where_their_bounds_come_from_and_why_they_do_not_fit():
    for row in ROWS:
        assert bool(row.bounds_from) == (row.hbm_gb is not None or row.sent_gb is not None)
        assert row.fits or row.note
    assert TABLES["aya23"][3].sent_gb == 200


def test_what_a_report_breaks_is_named():
    row = dataclasses.replace(ROWS[0], hbm_gb=5.4, sent_gb=4.1, bounds_from="here")
    assert row.broken(report()) == ["HBM: 5.50 GB of at most 5.40 (here)"]
    assert dataclasses.replace(row, hbm_gb=5.6).broken(report()) == []
    assert dataclasses.replace(row, hbm_gb=5.6, sent_gb=3.9).broken(report()) == [
        "sent: 4.00 GB of at most 3.90 (here)"
    ]
    assert row.broken(report(fits=False)) == ["does not fit"]
    assert dataclasses.replace(row, fits=False).broken(report()) == [
        "fits, but its row says that it does not"
    ]


def test_the_digest_follows_included_files_but_not_comments(tmp_path):
    (tmp_path / "inner.gin").write_text("WIDTH = 8\n")
    (tmp_path / "outer.gin").write_text(f"include '{tmp_path}/inner.gin'\nDEPTH = %WIDTH\n")
    row = dataclasses.replace(ROWS[0], files=(str(tmp_path / "outer.gin"),))
    before = row.digest(VERSIONS)
    (tmp_path / "inner.gin").write_text("# A comment.\n\nWIDTH = 8  # wide\n")
    assert row.digest(VERSIONS) == before
    (tmp_path / "inner.gin").write_text("WIDTH = 16\n")
    assert row.digest(VERSIONS) != before
