"""From process start to the first generated token of a bfloat16 checkpoint with the shapes of Llama 3.2 1B (2.5 GB).

This project reads the Hugging Face directory as it is, as `--checkpoint` does, and transformers reads it by `from_pretrained`;
both answer one prompt of 16 tokens, with imports counted. They alternate in fresh processes, with files that are not in the page
cache (cold) and files that are (warm). Programs that XLA has compiled are kept between the processes, as they are for a user,
and were compiled before the first round.
"""

import os
import tempfile
import time
from typing import Any

from tests.benchmarks import compare, hf_import

PROMPT = list(range(100, 116))


def run(*, rounds: int = 5, tiny: bool = False) -> dict[str, Any]:
    """Alternates both sides `rounds` times, cold and then warm."""
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "source")
        size = hf_import.write_checkpoint(source, tiny=tiny)
        commands = {
            "ours": compare.ours("first_token", source),
            "transformers": compare.peer("torch/llama_torch.py", "first_token", source),
        }
        env = {"JAX_COMPILATION_CACHE_DIR": os.path.join(folder, "programs")}
        for command in commands.values():
            compare.measured(command, env=env)
        reports = hf_import.cold_and_warm(commands, source, rounds, env=env)
    return {
        "checkpoint_mb": size / 1e6,
        **hf_import.ratios(reports, "first_token_s"),
        "seconds": compare.each(reports, "first_token_s"),
        "peak_mb": compare.each(reports, "peak_mb"),
        "contended": compare.contended(reports),
        "peer_versions": reports["transformers_warm"][0]["versions"],
    }


def side(source: str) -> dict[str, Any]:
    """Answers the prompt in this process."""
    from espalier.launch.load.load import load
    from espalier.launch.submit.worker import peak_bytes

    load(source).generate([PROMPT], max_new_tokens=1)
    seconds = time.time() - float(os.environ["BENCH_PROCESS_START"])
    return {"first_token_s": seconds, "peak_mb": peak_bytes(os.getpid()) / 1e6}
