"""Prepares what a run needs beforehand: vocabularies and their comparison, token caches, preference pairs, domain embeddings.

  espalier prepare vocabulary --gin_file=t5x_configs/data/corpus.gin --gin.VOCAB_SIZE=4096
  espalier prepare cache --gin_file=t5x_configs/data/bytes.gin --gin.MIXTURE_OR_TASK_NAME=text

`espalier prepare NAME --help` shows the flags of one preparation, with an example.
"""

from espalier.launch import cli

COMMANDS = cli.sub_commands("prepare")

if __name__ == "__main__":
    raise SystemExit(cli.subcommand(__doc__, COMMANDS))
