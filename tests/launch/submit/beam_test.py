"""Apache Beam on Dataflow and on Flink: what a dry run shows. Nothing is ever sent, so that services are never asked."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from espalier.common import pipelines
from espalier.launch.environment import ROOT
from espalier.launch.submit import __main__ as submit
from espalier.launch.submit import launch_config
from espalier.launch.submit.base import Job, SubmitError
from espalier.launch.submit.beam import dataflow, flink

HERE = pathlib.Path(__file__).parent
DATAFLOW, FLINK = (f"launch/submit/configs/{name}.py" for name in ("dataflow", "flink"))
GIVEN = {
    DATAFLOW: (
        "project=mine",
        "bucket=gs://bucket/dataflow",
        "image=host/espalier:1",
        "env=('ESPALIER_CACHE=gs://bucket/cache',)",
    ),
    FLINK: ("image=host/espalier:1",),
}
CACHE = ("prepare", "cache", "--gin.MIXTURE_OR_TASK_NAME=text")
SCORE = ("score", "--checkpoint=gs://b/run", "--inputs=gs://b/x.jsonl", "--output=gs://b/y.jsonl")
HOSTILE = ("a b", "$(touch PWNED)", "`touch PWNED`", "'; touch PWNED; '", "line\n- x", "{{x}}", "ü")


def read(config, *overrides):
    return launch_config.read(config, (*GIVEN[config], *overrides))


def job(words=CACHE):
    command = ("python", "-m", f"espalier.launch.{words[0]}", *words[1:])
    return Job(name=words[0], command=command, log="/log.txt")


def shown(config, *overrides, words=CACHE):
    queue = read(config, *overrides).submitter()
    queue.submit(job(words))
    return queue.preview()


def options(word):
    """The options of a pipeline by name, from the flag of its command."""
    texts = word.removeprefix("--beam_pipeline_options=").split(",")
    return dict(text.removeprefix("--").partition("=")[::2] for text in texts)


@pytest.mark.parametrize(
    ("config", "golden", "words"), [(DATAFLOW, "dataflow.sh", CACHE), (FLINK, "flink.yaml", SCORE)]
)
def test_a_dry_run_says_what_starts_and_costs(config, golden, words, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    estimate = ("tokens=1000000000000", "tokens_per_second=250000", "price_per_core_hour=0.25")
    settings = [f"--config.{word}" for word in (*GIVEN[config], *estimate)]
    assert submit.main([f"--config={config}", *settings, "--dry_run", "--", *words]) == 0
    out = re.sub("(prepare|score)-[0-9a-f]{6}", r"\1-DIGEST", capsys.readouterr().out)
    assert out == (HERE / "goldens" / golden).read_text()
    hours = 1e12 / 250_000 / 3600
    assert f" {hours:,.1f} core hours: {hours / 80:,.2f} hours of 80 cores" in out
    assert f"Cost: {hours * 0.25:,.2f}, in the currency of your price" in out


def test_without_a_price_there_is_no_money_and_without_tokens_no_estimate():
    text = shown(DATAFLOW, "tokens=3600000000000")
    assert "3,600,000,000,000 tokens at 500,000 a second" in text and "Cost" not in text
    assert "measured here; measure yours" in text
    assert "Estimate: none. Give --config.tokens=N" in shown(FLINK)


def test_dataflow_starts_what_the_settings_ask_for(tmp_path):
    """Runs all printed commands with programs that only write down what they get."""
    record = tmp_path / "words.jsonl"
    program = "import json, os, sys; print(json.dumps([sys.argv, dict(os.environ)]), file=open({!r}, 'a'))"
    for name in ("docker", "gcloud", "python"):
        file = tmp_path / name
        file.write_text(f"#!{sys.executable}\n{program.format(str(record))}\n")
        file.chmod(0o755)
    env = tuple(f"V{i}={word}" for i, word in enumerate(HOSTILE))
    text = shown(DATAFLOW, f"env={env!r}", "workers=3", words=(*SCORE, *HOSTILE))
    own = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash"], input=text, text=True, check=True, env=own, cwd=tmp_path)
    calls = [json.loads(line) for line in record.read_text().splitlines()]
    build, push, (driver, variables), *_ = calls
    assert build[0][1:] == ["build", "--target=beam", "--tag=host/espalier:1", "."]
    assert push[0][1:] == ["push", "host/espalier:1"]
    assert driver[1:-1] == ["-m", "espalier.launch.score", *SCORE[1:], *HOSTILE]
    assert [variables[f"V{i}"] for i in range(len(HOSTILE))] == list(HOSTILE)
    given = options(driver[-1])
    assert given["max_num_workers"] == given["num_workers"] == "3"
    assert given["experiments"] == "no_use_multiple_sdk_containers"  # one process reads the model
    assert given["staging_location"] == "gs://bucket/dataflow/staging"
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("words", [CACHE, SCORE])
def test_manifests_follow_the_schemas(words):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    jsonschema = pytest.importorskip("jsonschema")
    cluster, driver = yaml.safe_load_all(shown(FLINK, "service_account=driver", words=words))
    schema = json.loads((HERE / "flinkdeployment.schema.json").read_text())
    jsonschema.validate(cluster, schema)
    pod = cluster["spec"]["taskManager"]["podTemplate"]
    pod = {**pod, "metadata": {"name": "x"}}
    pod["spec"]["containers"][0]["image"] = "flink"  # the operator completes this container
    for manifest, spec in ((pod, pod["spec"]), (driver, driver["spec"]["template"]["spec"])):
        kubernetes_validate.validate(manifest, "1.35", strict=True)
        spec["containerz"] = []
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(manifest, "1.35", strict=True)


@pytest.mark.parametrize(("words", "processes"), [(CACHE, 8), (SCORE, 1)])
def test_flink_has_a_slot_and_a_python_process_for_each_element_at_a_time(words, processes):
    cluster, driver = yaml.safe_load_all(shown(FLINK, "workers=5", words=words))
    (main,) = driver["spec"]["template"]["spec"]["containers"]
    given = options(main["command"][-1])
    slots = cluster["spec"]["flinkConfiguration"]["taskmanager.numberOfTaskSlots"]
    assert slots == given["sdk_worker_parallelism"] == str(processes)
    assert given["parallelism"] == str(5 * processes)
    pool = cluster["spec"]["taskManager"]["podTemplate"]["spec"]["containers"][1]
    assert given["environment_config"] == f"localhost:{pool['ports'][0]['containerPort']}"
    assert given["flink_master"] == f"http://{cluster['metadata']['name']}-rest:8081"
    (archive,) = driver["spec"]["template"]["spec"]["initContainers"]
    assert given["flink_job_server_jar"].startswith(f"{archive['command'][-1]}/")
    folders = ({mount["name"] for mount in one["volumeMounts"]} for one in (pool, main))
    assert list(folders) == [{"data"}, {"data", "jars"}]


def test_pods_get_the_words_as_they_were():
    _, driver = yaml.safe_load_all(shown(FLINK, words=(*SCORE, *HOSTILE)))
    (main,) = driver["spec"]["template"]["spec"]["containers"]
    words = [word.replace("$$", "$") for word in main["command"]]
    assert words[3:-1] == [*SCORE[1:], *HOSTILE]


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        (DATAFLOW, ("bucket=",), "bucket: there is no default; give --config.bucket=gs://BUCKET"),
        (DATAFLOW, ("bucket=/tmp",), "bucket = '/tmp': give a text like gs://BUCKET/dataflow"),
        (DATAFLOW, ("workers=0",), "workers = 0: give a number of at least 1"),
        (DATAFLOW, ("public_ips=False",), "public_ips = False needs a subnetwork"),
        (DATAFLOW, ("machine_type=n2-custom-4-512",), "cores: those of machine_type = 'n2-custom"),
        (DATAFLOW, ("options=('--region=here',)",), "--region follows from the other settings"),
        (DATAFLOW, ("secrets=('A=b',)",), "secrets: Dataflow has none"),
        (DATAFLOW, ("price_per_core_hour=1.0",), "price_per_core_hour is for the estimate"),
        (FLINK, ("image=",), "image: there is no default"),
        (FLINK, ("cpu=3",), "cpu = '3': give cores"),
        (FLINK, ("flink_version=1",), "flink_version = '1': give a text like 1.20"),
    ],
)
def test_what_is_missing_or_contradicts_itself_is_refused_by_name(config, overrides, message):
    with pytest.raises(SubmitError, match=message):
        read(config, *overrides)


LOCAL = "--config.env=('ESPALIER_CACHE=/home/me/cache',)"


@pytest.mark.parametrize(
    ("config", "words", "message"),
    [
        (DATAFLOW, (LOCAL, "--", *CACHE), "ESPALIER_CACHE = '/home/me/cache': the workers of"),
        (DATAFLOW, ("--config.env=()", "--", *CACHE), "ESPALIER_CACHE is missing, so that every"),
        (FLINK, (LOCAL, "--", *CACHE), "ESPALIER_CACHE = '/home/me/cache': pods do not see it"),
        (DATAFLOW, ("--", *SCORE, "--inputs=x.jsonl"), "--inputs = 'x.jsonl': the workers of Data"),
        (DATAFLOW, ("--", *SCORE, "--adapter", "/x"), "--adapter = '/x': the workers of Dataflow"),
        (
            DATAFLOW,
            ("--", *CACHE, "--gin.FILES=('/x/*',)"),
            r"FILES = '/x/\*': the workers of Data",
        ),
        (FLINK, ("--", *SCORE, "--inputs=/x"), "--inputs = '/x': pods do not see it"),
        (
            DATAFLOW,
            ("--config.tokens=5", "--", *SCORE),
            "how fast score is depends on what it reads",
        ),
        (DATAFLOW, ("--", "train", "--x=1"), "train: Apache Beam runs prepare cache"),
        (DATAFLOW, ("--gin.TRAIN_STEPS=1",), "train: Apache Beam runs prepare cache"),
        (
            DATAFLOW,
            ("--", *SCORE, "--beam_pipeline_options=x"),
            "the launch configuration gives it",
        ),
        (DATAFLOW, ("--", *CACHE, "--workers=2"), "--workers: .* has config.workers"),
        (DATAFLOW, ("--status", "--", *SCORE), "the commands for Dataflow are for a person"),
        (FLINK, ("--cancel", "--", *SCORE), "the manifests for Flink are for a person"),
    ],
)
def test_work_that_workers_could_not_do_is_refused_by_name(config, words, message, capsys):
    given = [f"--config.{word}" for word in GIVEN[config]]
    if words[0].startswith("--config.env"):
        given = [word for word in given if not word.startswith("--config.env")]
    assert submit.main([f"--config={config}", *given, *words]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error


def test_the_page_has_commands_that_can_be_shown(capsys):
    page = pathlib.Path(ROOT, "docs/scale/clusters.md").read_text()
    found = re.findall(r"^espalier submit ((?:.*\\\n)+.*)", page, re.MULTILINE)
    found = [shlex.split(text.replace("\\\n", " ")) for text in found]
    found = [words for words in found if "--" in words]
    assert len(found) == 2
    for words in found:
        assert submit.main(words) == 0
    assert "20 machines n2-standard-8 (160 cores)" in capsys.readouterr().out


def test_commands_with_a_pipeline_are_known():
    from espalier.launch.submit.beam.settings import COMMANDS

    # Commands have the flag by pipelines.add_flag, or with --workers by launch/prepare/workers.py.
    texts = [path.read_text() for path in pathlib.Path(ROOT, "launch").rglob("*.py")]
    names = [
        match[1] or match[2]
        for text in texts
        if "pipelines.add_flag(" in text or "workers.add_flags" in text
        for match in re.finditer(r'command\(\s*__doc__, "([\w ]+)"|command="([\w ]+)"', text)
    ]
    assert sorted(names) == sorted(COMMANDS)


def test_the_image_has_one_version_of_beam():
    dockerfile = pathlib.Path(ROOT, "Dockerfile").read_text()
    (image,) = re.findall(r"--from=apache/beam_python3.11_sdk:([\d.]+)", dockerfile)
    (locked,) = re.findall(r"^apache-beam==(.*)$", constraints(), re.MULTILINE)
    assert image == locked == flink.Settings.beam_version
    assert "make beam" in dockerfile and "AS beam" in dockerfile
    assert dataflow.Settings.python == ".venv-beam/bin/python"


def constraints():
    return pathlib.Path(ROOT, "constraints", "beam.txt").read_text()


@pytest.mark.beam
@pytest.mark.parametrize("config", [DATAFLOW, FLINK])
def test_beam_has_all_options(config):
    """Apache Beam's own parser takes every option, and knows it."""
    words = re.findall(r"--beam_pipeline_options=\S+", shown(config, words=SCORE))
    assert len(words) == 1
    texts = [words[0].partition("=")[2]]
    flags = pipelines.parsed_options(texts)
    known = pipelines.apache_beam().options.pipeline_options.PipelineOptions(flags)
    assert known.get_all_options(retain_unknown_options=True) == known.get_all_options()
    assert not pipelines.is_local(flags)
