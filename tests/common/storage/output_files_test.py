"""Outputs that users name: whole files, links, devices and pipes."""

import os
import pathlib
import stat
import subprocess
import sys
import threading

import pytest

from espalier.common.storage import output_files, paths
from espalier.launch.inference import row_files

ROWS = [{"a": 1}, {"a": 2}]
LINES = b'{"a": 1}\n{"a": 2}\n'


def test_a_device_stays_a_device(tmp_path):
    device = str(tmp_path / "null")
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        open(device, "wb").close()
    except PermissionError:
        pytest.skip("this user cannot make devices")
    row_files.check_output(device, others={"json": device})
    row_files.write(device, ROWS)
    output_files.write(device, "text")
    assert stat.S_ISCHR(os.stat(device).st_mode)
    assert os.listdir(tmp_path) == ["null"]
    with pytest.raises(row_files.RowFileError, match="is no file"), row_files.resumed(device):
        pass


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst"])
def test_a_pipe_gets_the_rows(tmp_path, name):
    pipe, copy = str(tmp_path / name), str(tmp_path / f"copy_{name}")
    os.mkfifo(pipe)
    row_files.check_output(pipe, compressed=True)
    got: list[bytes] = []
    reader = threading.Thread(
        target=lambda: got.append(pathlib.Path(pipe).read_bytes()), daemon=True
    )
    reader.start()
    row_files.write(pipe, ROWS)
    reader.join(10)
    with open(copy, "wb") as file:
        file.write(got[0])
    assert [row for _, row in row_files.read(copy, example="")] == ROWS
    assert stat.S_ISFIFO(os.stat(pipe).st_mode)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_goes_where_the_shell_sends_it(tmp_path, name):
    file = tmp_path / "out.jsonl"
    file.write_bytes(b"before\n")
    code = f"from espalier.launch.inference import row_files; row_files.check_output({name!r}); row_files.write({name!r}, {ROWS})"
    with open(file, "ab") as out:
        before = os.fstat(out.fileno())
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert os.path.samestat(before, os.stat(file))
    assert file.read_bytes() == b"before\n" + LINES


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "rows.jsonl", tmp_path / "rows.jsonl"
    link.symlink_to("far/rows.jsonl")
    for _ in range(2):  # without its file, and with it
        row_files.check_output(str(link))
        row_files.write(str(link), ROWS)
        assert link.is_symlink() and not target.is_symlink() and target.read_bytes() == LINES
        target.write_bytes(b"old")
    assert sorted(os.listdir(tmp_path)) == ["far", "rows.jsonl"]
    nowhere, loop = tmp_path / "nowhere", tmp_path / "loop"
    nowhere.symlink_to("none/x")
    loop.symlink_to("loop")
    for path, problem in ((nowhere, "there is no folder"), (loop, "Too many levels")):
        with pytest.raises(row_files.RowFileError, match=f"--output={path}: {problem}"):
            row_files.check_output(str(path))


def test_a_planted_link_to_another_file_is_not_followed(tmp_path):
    victim, planted = tmp_path / "victim", tmp_path / "rows.jsonl.partial"
    victim.write_text("precious")
    planted.symlink_to("victim")
    row_files.write(str(tmp_path / "rows.jsonl"), ROWS)
    assert victim.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["rows.jsonl", "victim"]


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    for keep in (True, False):
        with pytest.raises(ZeroDivisionError), output_files.opened(path, keep=keep) as file:
            file.write(b"new")
            raise ZeroDivisionError
        assert path.read_text() == "old"
        assert (tmp_path / "x.partial").exists() == keep
        (tmp_path / "x.partial").unlink(missing_ok=True)
        assert os.listdir(tmp_path) == ["x"]


def test_of_two_processes_that_write_one_file_the_first_is_told(tmp_path):
    path = tmp_path / "x"
    with (
        pytest.raises(output_files.OutputError, match="another process"),
        output_files.opened(path) as one,
    ):
        one.write(b"one")
        with output_files.opened(path) as two:
            two.write(b"two")
    assert path.read_bytes() == b"two"


def test_a_full_disk_is_not_taken_for_a_written_row(tmp_path):
    """The last row is in a buffer until the file is closed."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from espalier.launch.inference import row_files; row_files.write('x.jsonl', [{'a': 'b' * 120}])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert b"File too large" in done.stderr
    assert os.listdir(tmp_path) == ["x.jsonl.partial"]


def test_an_address_gets_the_whole_file_or_nothing(store):
    path = f"{store.address}/rows.jsonl.gz"
    row_files.check_output(path, compressed=True)
    row_files.write(path, ROWS)
    assert [row for _, row in row_files.read(path, example="")] == ROWS
    with pytest.raises(ZeroDivisionError), output_files.opened(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert [row for _, row in row_files.read(path, example="")] == ROWS
    output_files.write(f"{store.address}/x.json", "{}")
    assert paths.names(store.address) == ["rows.jsonl.gz", "x.json"]
