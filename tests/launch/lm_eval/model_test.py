"""Models of lm-evaluation-harness against its own Hugging Face backend, and what it refuses."""

import contextlib
import importlib
import json
import os
import pathlib
import sys

import lm_eval
import numpy as np
import pytest
from lm_eval.api.instance import Instance

from espalier.launch.convert import __main__ as convert
from espalier.launch.lm_eval import __main__ as command
from espalier.launch.lm_eval.arguments import options
from espalier.launch.lm_eval.model import EspalierLM
from espalier.launch.load.load_run import LoadError
from espalier.trainers.decoding.sampling import Sampling
from espalier.trainers.scoring.scoring import Row, Scorer

GOLDENS = pathlib.Path(__file__).parents[2] / "goldens"
CASES = pathlib.Path(os.environ.get("LM_EVAL_CASES", GOLDENS / "lm_eval"))
NAMES = sorted(path.parent.name for path in CASES.glob("*/answers.json"))


@pytest.fixture(scope="module")
def golden():
    """The script that made the goldens, for what it asked."""
    sys.path.insert(0, str(GOLDENS))
    yield importlib.import_module("make_lm_eval")
    sys.path.remove(str(GOLDENS))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The harness's task manager over the goldens' tasks; nothing is kept outside a temporary folder."""
    import datasets
    from lm_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(GOLDENS.parents[2])
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield TaskManager(include_path=str(GOLDENS / "lm_eval" / "tasks"), include_defaults=False)


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory):
    """(answers of the peer, the model)."""
    folder = CASES / request.param
    run = tmp_path_factory.mktemp(request.param) / "run"
    assert convert.main([f"--from_hf={folder / 'model'}", f"--to={run}"]) == 0
    # The checkpoint is float16, and the peer computed in float32.
    with opened(str(run), dtype="float32", batch_tokens=4096) as model:
        yield json.loads((folder / "answers.json").read_bytes()), model


@contextlib.contextmanager
def opened(checkpoint, **arguments):
    """The model of a run, closed in the end."""
    model = EspalierLM(checkpoint, **arguments)
    try:
        yield model
    finally:
        model.close()


@pytest.fixture(scope="module")
def native(trained_run):
    """The model of a run on bytes that was trained here."""
    with opened(trained_run.path, params="raw", max_length=64, batch_tokens=256) as model:
        yield model


def requests(kind, *arguments):
    """Requests as the harness makes them."""
    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=i)
        for i, given in enumerate(arguments)
    ]


@pytest.mark.parametrize("run", ["plain", "chat"])
def test_answers_are_those_of_the_hugging_face_backend(case, golden, tasks, run):
    want, model = case
    names, options = golden.RUNS[run]
    results = lm_eval.simple_evaluate(
        model, tasks=list(names), task_manager=tasks, bootstrap_iters=0, **options
    )
    for name in names:
        samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
        assert len(samples) == len(want[run][name]["samples"])
        for sample, expected in zip(samples, want[run][name]["samples"], strict=True):
            assert _plain(sample["arguments"]) == expected["arguments"]
            assert_same(_plain(sample["resps"]), expected["answers"])
        for key, value in want[run][name]["metrics"].items():
            np.testing.assert_allclose(results["results"][name][key], value, rtol=1e-5)


def assert_same(found, expected):
    """Texts and greedy choices exactly, log-probabilities to 1e-4."""
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-4, rel=1e-6)
    else:
        assert found == expected


def _plain(value):
    """What JSON makes of it."""
    return json.loads(json.dumps(value))


def test_a_run_reads_its_start_token_before_every_context(native, trained_run):
    texts = requests("loglikelihood", ("import", " os"), ("", "def f"), ("x" * 100, "yz"))
    found = native.loglikelihood(texts)
    byte = [[3 + b for b in text.encode()] for text in ("import", " os", "def f", "x" * 100, "yz")]
    start = [0]
    rows = [
        Row(context=start + byte[0], targets=byte[1]),
        Row(context=start, targets=byte[2]),
        Row(
            context=byte[3][-63:], targets=byte[4]
        ),  # cut, the start token first, to 64 tokens read
    ]
    scorer = Scorer(trained_run.model, trained_run.params["raw"], batch_size=8)
    for (log_prob, _), row, logp_T in zip(found, rows, scorer(rows), strict=True):
        assert len(row.context) + len(row.targets) - 1 <= 64
        assert log_prob == pytest.approx(float(logp_T.sum(dtype=np.float64)), abs=1e-4)
    rolled = native.loglikelihood_rolling(requests("loglikelihood_rolling", ("def f",), ("",)))
    assert rolled == [pytest.approx(found[1][0], abs=1e-4), 0.0]


def test_results_are_stored_under_the_checkpoint(native, tmp_path, monkeypatch):
    from lm_eval import loggers

    monkeypatch.setattr(loggers, "EvaluationTracker", loggers.EvaluationTracker)
    command.name_results()
    tracker = loggers.EvaluationTracker(output_path=str(tmp_path))
    config = {"model": "espalier", **native.get_model_info(), "device": "cuda:0"}
    tracker.save_results_aggregated({"config": config, "results": {}, "configs": {}})
    (path,) = tmp_path.glob("*/results_*.json")
    found = json.loads(path.read_text())
    assert path.parent.name == native.checkpoint.replace("/", "__")
    assert (found["model_name"], found["config"]["device"]) == (native.checkpoint, "cpu")


def test_answers_are_kept_as_they_come_and_not_asked_for_again(native, tmp_path, monkeypatch):
    from lm_eval.api.model import CachingLM

    asked = requests("loglikelihood", ("a", "b"), ("a", "c"))
    first = native.loglikelihood(asked[:1])
    try:
        cached = CachingLM(native, str(tmp_path / "answers.db"))
        assert cached.loglikelihood(asked)[0] == first[0]
        texts = cached.generate_until(
            requests("generate_until", ("import", {"until": ["\n"], "max_gen_toks": 4}))
        )
        assert len(cached.dbdict) == 3
        monkeypatch.setattr(native, "_scorer", None)
        monkeypatch.setattr(native, "_generator", None)
        assert cached.loglikelihood(asked)[0] == first[0]
        again = requests("generate_until", ("import", {"until": ["\n"], "max_gen_toks": 4}))
        assert cached.generate_until(again) == texts
    finally:
        native.set_cache_hook(type(native.cache_hook)(None))


def test_generation_options_are_read_as_the_harness_reads_them():
    def read(given, **said):
        return options(given, max_gen_toks=256, model_defaults=said)

    greedy = read({"until": "\n", "do_sample": False, "temperature": 0.7}, top_p=0.9)
    assert greedy.until == ("\n",) and greedy.max_gen_toks == 256
    assert greedy.sampling == Sampling(temperature=0.0)
    drawn = read({"temperature": 0.5, "top_k": 7, "max_tokens": 9}, top_p=0.9, top_k=50)
    assert drawn.max_gen_toks == 9
    assert drawn.sampling == Sampling(temperature=0.5, top_k=7, top_p=0.9)
    assert read({"do_sample": True}, top_k=0).sampling == Sampling(temperature=1.0)
    assert read({"do_sample": True, "temperature": 0}, top_k=9).sampling == greedy.sampling
    assert read({}, repetition_penalty=1.3).sampling.repetition_penalty == 1.3
    with pytest.raises(LoadError, match="num_beams is not supported. Valid options:"):
        read({"num_beams": 4})
    with pytest.raises(LoadError, match="gen_kwargs: top_p = 3 must be in"):
        read({"do_sample": True, "top_p": 3})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"max_lenght": 3},
            "there is no 'max_lenght' .did you mean 'max_length'[^)]*.. Arguments: checkpoint, ",
        ),
        ({"cache_policy": "snapkv", "cache_budget": 3}, "has no budget"),
        ({"params": "best"}, "params=best must be one of auto, raw, ema"),
        ({"dtype": "int8"}, "dtype=int8 must be one of float32, bfloat16, float16"),
        ({"batch_tokens": 0}, "batch_tokens=0 must be at least 1"),
        ({"max_length": 0}, "max_length=0 must be at least 1"),
        ({"batch_size": -4}, "--batch_size=-4 must be at least 1, or auto"),
        ({"batch_size": "many"}, "--batch_size=many must be at least 1, or auto"),
        ({"mesh": "fsdp"}, "mesh=fsdp must be like {'fsdp':8}"),
    ],
)
def test_wrong_arguments_are_named(trained_run, arguments, message):
    with pytest.raises(ValueError, match=message), opened(trained_run.path, **arguments):
        pass


def test_a_checkpoint_must_be_given_and_know_texts(trained_run, tmp_path):
    with pytest.raises(LoadError, match="give checkpoint=DIR"):
        EspalierLM()
    own = pathlib.Path(trained_run.path, "config.gin").read_text()
    (tmp_path / "no_vocabulary.gin").write_text(own + "\nVOCABULARY = None\n")
    wrong = opened(trained_run.path, gin_file=str(tmp_path / "no_vocabulary.gin"))
    with pytest.raises(LoadError, match="has no vocabulary, which the harness needs"), wrong:
        pass


def test_what_does_not_fit_the_model_is_refused(native):
    with pytest.raises(LoadError, match="continuation has 65 tokens, more than max_length=64"):
        native.loglikelihood(requests("loglikelihood", ("a", "b" * 65)))
    with pytest.raises(LoadError, match="The continuation '' of ...'a' has no token"):
        native.loglikelihood(requests("loglikelihood", ("a", "")))
    with pytest.raises(
        LoadError, match="max_gen_toks=64 leaves no room for a context in max_length=64"
    ):
        native.generate_until(requests("generate_until", ("a", {"max_gen_toks": 64})))
    with pytest.raises(LoadError, match="no chat template"):
        native.chat_template(True)


# The last one: gin's configuration is that of the model which was opened last, and `native` traces more programs above.
def test_a_small_job_needs_one_program_for_scores_and_two_for_answers(trained_run, compiled):
    """Requests of many lengths; no operation of jax runs, and so compiles, outside of these programs."""
    with opened(trained_run.path, params="raw", max_length=64, batch_tokens=256) as model:
        compiled.clear()
        contexts = ["x" * length for length in (1, 5, 14, 20, 25, 34, 40, 50)]
        pairs = [(context, end) for context in contexts for end in ("y", "yz", "yzyzyzyzyz")]
        assert len(model.loglikelihood(requests("loglikelihood", *pairs))) == len(pairs)
        assert len(compiled) == 1, compiled
        answers = {"until": ["\n"], "max_gen_toks": 4}
        asked = [(context, answers) for context in contexts]
        assert len(model.generate_until(requests("generate_until", *asked))) == len(asked)
        assert len(compiled) == 3, compiled
