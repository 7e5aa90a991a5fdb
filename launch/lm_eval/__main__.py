"""lm-evaluation-harness with the runs of this project as `--model espalier`.

Example, after a run in /tmp/espalier_tiny (see espalier train --help) and
`pip install -e '.[eval]'`:

  espalier lm_eval --model espalier --model_args checkpoint=/tmp/espalier_tiny --tasks my_task \\
    --include_path my_tasks

This command registers the model and passes all arguments on to the harness, which has no other way to find
models of other packages. launch/lm_eval/model.py describes the model's arguments (model_args); an
unknown argument is an error that lists them.
"""

import sys
from typing import Any

from espalier.launch import cli

MODEL = "espalier"


def register() -> None:
    """Registers the model in the harness; raises LoadError if it is not installed."""
    try:
        import lm_eval.models  # noqa: F401  # registers the harness's own models
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        from espalier.launch.load.load_run import LoadError

        raise LoadError(
            f"lm-evaluation-harness cannot be imported ({error}): pip install 'lm-eval>=0.4.13'."
        ) from None
    if MODEL not in model_registry:
        model_registry.register(MODEL, target="espalier.launch.lm_eval.model:EspalierLM")


def name_results() -> None:
    """Lets the harness store results under the checkpoint's path, which it looks for in arguments of other names.

    Without this, the folder of a model's results has a random name, and their "device" is the harness's default.
    """
    import jax
    from lm_eval import loggers, utils

    class EvaluationTracker(loggers.EvaluationTracker):
        def save_results_aggregated(
            self, results: dict[str, Any], samples: dict[str, Any] | None = None
        ) -> None:
            config, own = results["config"], self.general_config_tracker
            if config["model"] == MODEL:
                own.model_name = config["adapter"] or config["checkpoint"]
                own.model_name_sanitized = utils.sanitize_model_name(own.model_name)
                config["device"] = jax.default_backend()
            super().save_results_aggregated(results, samples)

    loggers.EvaluationTracker = EvaluationTracker


def main() -> int:
    """Runs the harness's command line with this process's arguments."""

    def call() -> None:
        with cli.prepared(cli.program_name("espalier.launch.lm_eval")):
            register()
            name_results()
            from lm_eval.__main__ import cli_evaluate

            if {"-h", "--help"} & set(sys.argv[1:]):
                print(__doc__)
            cli_evaluate()

    return cli.status_of(call)


if __name__ == "__main__":
    raise SystemExit(main())
