"""Prepares what a run needs beforehand: vocabularies and their comparison, token caches, preference pairs, domain embeddings.

  python -m launch.prepare vocabulary --gin_file=t5x_configs/data/corpus.gin --gin.VOCAB_SIZE=4096
  python -m launch.prepare cache --gin_file=t5x_configs/data/bytes.gin --gin.MIXTURE_OR_TASK_NAME=text

`python -m launch.prepare NAME --help` shows the flags of one preparation, with an example.
"""

from launch import cli

COMMANDS = {
    "vocabulary": "launch.preparation.vocabulary",
    "compare_tokenizers": "launch.preparation.compare_tokenizers",
    "cache": "launch.preparation.cache",
    "preference_pairs": "launch.preparation.preference_pairs",
    "arena_prompts": "launch.preparation.arena_prompts",
    "best_of_n": "launch.preparation.best_of_n",
    "arbitrage": "launch.preparation.arbitrage",
    "synthetic_code": "launch.preparation.synthetic_code",
    "embed_domains": "launch.preparation.embed_domains",
}

if __name__ == "__main__":
    raise SystemExit(cli.subcommand(__doc__, COMMANDS))
