"""Steps of work over a corpus, by pipelines of Apache Beam (`make test-beam`)."""

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from espalier.common import pipelines, versions
from espalier.common.pipelines import PipelineError, Step
from tests.processes import free_port

beam = pytest.mark.beam
PROCESSES = "--runner=DirectRunner,--direct_running_mode=multi_processing,--direct_num_workers=2"


@dataclasses.dataclass(frozen=True)
class Squares:
    """Writes the squares of numbers as files, then their sum."""

    folder: str
    number: int = 6
    kills: bool = False  # the first process that comes to element 3 is killed

    def steps(self):
        folder = (self.folder,)
        return [
            Step("write squares", self.square, range(self.number), folder),
            Step("add them", self.add, [None], folder),
        ]

    def square(self, number):
        if self.kills and number == 3:
            with contextlib.suppress(FileExistsError):
                pathlib.Path(self.folder, "killed").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        pathlib.Path(self.folder, f"{number}.txt").write_text(str(number**2))
        return {"squares": 1, "digits": len(str(number**2))}

    def add(self, _):
        parts = [pathlib.Path(self.folder, f"{n}.txt").read_text() for n in range(self.number)]
        pathlib.Path(self.folder, "sum.txt").write_text(str(sum(map(int, parts))))
        return {"sums": 1}

    def fail(self, number):
        raise ValueError(f"file_{number}.jsonl, line 7: malformed")


COUNTS = {"squares": 6, "digits": 8, "sums": 1}


@pytest.mark.parametrize(
    ("texts", "options"),
    [
        (["--runner=DirectRunner,--a=1"], ["--runner=DirectRunner", "--a=1"]),
        (["runner=DirectRunner,a=1"], ["--runner=DirectRunner", "--a=1"]),  # as for TFDS
        (["--runner=DirectRunner", "--a=1"], ["--runner=DirectRunner", "--a=1"]),
        (["--experiments=a,b,--streaming"], ["--experiments=a,b", "--streaming"]),
        (['--environment_config={"a": 1, "b": 2}'], ['--environment_config={"a": 1, "b": 2}']),
    ],
)
def test_options_are_read_as_by_seqio_and_tfds(texts, options):
    assert pipelines.parsed_options(texts) == options


def test_what_is_no_option_is_refused():
    with pytest.raises(PipelineError, match="'-x' is no option"):
        pipelines.parsed_options(["-x"])


def test_workers_on_this_machine_see_its_files():
    assert pipelines.is_local(["--direct_num_workers=2"])
    assert pipelines.is_local(["--runner=PortableRunner", "--environment_type=LOOPBACK"])
    assert not pipelines.is_local(["--runner=FlinkRunner", "--environment_type=EXTERNAL"])
    assert not pipelines.is_local(["--runner=DataflowRunner"])


@pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is not None, reason="Apache Beam is installed"
)
def test_a_missing_extra_is_one_error(tmp_path):
    with pytest.raises(PipelineError, match=r"pip install -e '\.\[beam\]'"):
        pipelines.run(Squares(str(tmp_path)).steps(), beam_options=["--runner=DirectRunner"])


def test_a_worker_of_other_versions_is_refused():
    pipelines.check_versions(versions.own())
    with pytest.raises(PipelineError, match=r"numpy 1\.0 \(here .*\): give all workers"):
        pipelines.check_versions({**versions.own(), "numpy": "1.0"})


@beam
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--runer=DirectRunner", "no option --runer; did you mean 'runner'"),
        ("--runner=DirectRuner", "no runner 'DirectRuner'; did you mean 'DirectRunner'"),
        ("--direct_num_workers=many", "a value is not valid"),
    ],
)
def test_options_that_beam_does_not_have_are_refused(options, message):
    with pytest.raises(PipelineError, match=message):
        pipelines.checked_options([options])


@beam
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of Beam's
def test_a_pipeline_goes_on_after_one_whose_worker_was_killed(tmp_path, capfd):
    steps = Squares(str(tmp_path), kills=True).steps()
    with pytest.raises(PipelineError, match="the same command goes on"):
        pipelines.run(steps, beam_options=[PROCESSES])
    assert not (tmp_path / "sum.txt").exists()
    capfd.readouterr()
    assert pipelines.run(steps, beam_options=[PROCESSES]) == COUNTS
    assert (tmp_path / "sum.txt").read_text() == "55"
    assert "write squares (6), then add them (1)\n" in (said := capfd.readouterr().err)
    assert "pipeline done, 8 digits, 6 squares, 1 sums\n" in said


@beam
def test_a_pipeline_fails_with_the_error_of_the_work(tmp_path):
    squares = Squares(str(tmp_path))
    steps = [Step("fail", squares.fail, [5]), Step("add them", squares.add, [None])]
    with pytest.raises(PipelineError, match=r"failed: file_5.jsonl, line 7: malformed$"):
        pipelines.run(steps, beam_options=["--runner=DirectRunner"])
    lacking = Step("read", squares.square, [0], ("/not/here",))
    with pytest.raises(PipelineError, match="does not see /not/here: mount the folder"):
        pipelines.run([lacking], beam_options=["--runner=DirectRunner"])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def job_server():
    """The address of a job server of this machine, which is how Flink and Spark are reached."""
    port = free_port()
    command = ["-m", "apache_beam.runners.portability.local_job_service_main", f"--port={port}"]
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield f"localhost:{port}"
    finally:
        process.kill()
        process.wait()


@beam
def test_a_job_server(tmp_path, job_server):
    options = f"--runner=PortableRunner,--job_endpoint={job_server},--environment_type=LOOPBACK"
    assert pipelines.run(Squares(str(tmp_path)).steps(), beam_options=[options]) == COUNTS
    assert (tmp_path / "sum.txt").read_text() == "55"
