"""The harness's command line: it finds the model, and gets all arguments as they are."""

import sys

from espalier.launch.lm_eval import __main__ as command_module


def test_the_model_is_found_by_its_name():
    from lm_eval.api.registry import get_model

    from espalier.launch.lm_eval.model import EspalierLM

    command_module.register()
    command_module.register()  # once is enough, twice does no harm
    assert get_model("espalier") is EspalierLM
    assert get_model("dummy").__name__ == "DummyLM"


def test_arguments_and_errors_are_passed_through(monkeypatch, command, capsys):
    from lm_eval import __main__ as harness

    seen = []
    monkeypatch.setattr(harness, "cli_evaluate", lambda: seen.append(sys.argv[1:]))
    assert command("lm_eval", "run", "--model", "espalier", "--tasks", "x") == 0
    assert seen == [["run", "--model", "espalier", "--tasks", "x"]]

    def refuse():
        from espalier.launch.load.load_run import LoadError

        raise LoadError("no such run")

    monkeypatch.setattr(harness, "cli_evaluate", refuse)
    assert command("lm_eval", "--model", "espalier") == 2
    assert capsys.readouterr().err.endswith("\nerror: no such run\n")


def test_a_missing_harness_is_one_error(monkeypatch, command, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.models", None)
    assert command("lm_eval", "--help") == 2
    assert "pip install 'lm-eval>=0.4.13'" in capsys.readouterr().err
