"""The command that cleans documents: its flags, what it prints, and what it refuses."""

import json

from espalier.launch.prepare import documents


def run(folder, *flags):
    files, output = f"'{folder}/*.jsonl'", f"'{folder}/clean'"
    return documents.main([f"--gin.FILES={files}", f"--gin.OUTPUT={output}", *flags])


def test_counts_are_printed(tmp_path, capsys):
    filters = tmp_path / "filters.gin"
    filters.write_text(
        "from __gin__ import dynamic_registration\n"
        "from espalier.data.text import document_filters\n"
        "from espalier.launch.prepare import documents\n"
        "documents.prepare_documents.filters = [@document_filters.Metadata()]\n"
        "document_filters.Metadata.key = 'lang'\n"
        "document_filters.Metadata.keep = ['en']\n"
    )
    rows = [("a text that is there twice", "en")] * 2 + [("another text", "en"), ("ein Text", "de")]
    lines = [json.dumps({"text": text, "lang": lang}) + "\n" for text, lang in rows]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    assert run(tmp_path, f"--gin_file={filters}", "--workers=1") == 0
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(" ".join(words[:-4]), words[-4]) for words in said[:-1]] == [
        ("read", "4"),
        ("dropped: empty", "0"),
        ("dropped: lang", "1"),
        ("dropped: near-duplicates", "1"),
        ("kept", "2"),
    ]
    assert said[-1] == [f"{tmp_path}/clean:", "1", "shards"]


def test_processes_here_and_pipelines_are_not_both_given(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    flags = ("--workers=2", "--beam_pipeline_options=--runner=DirectRunner")
    assert run(tmp_path, *flags) == 2
    assert "error: --workers is the number of processes of this machine" in capsys.readouterr().err
