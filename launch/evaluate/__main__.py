"""Evaluates a run: held-out loss, SeqIO metrics, rank classification, pass@k, a paper's suite, win rates, refusals, languages of answers or expert routing.

  espalier evaluate loss --checkpoint=/tmp/espalier_tiny --trust_config --json=/tmp/eval.json
  espalier evaluate harness --checkpoint=/tmp/espalier_tiny --suite=code_mix --data_dir=/data/eval

`espalier evaluate NAME --help` shows the flags of one evaluation, with an example.
"""

from espalier.launch import cli

COMMANDS = cli.sub_commands("evaluate")

if __name__ == "__main__":
    raise SystemExit(cli.subcommand(__doc__, COMMANDS))
