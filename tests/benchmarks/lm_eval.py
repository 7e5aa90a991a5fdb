"""lm-evaluation-harness with this project's model against its own Hugging Face backend: requests per second.

Both sides have the same checkpoint and requests and alternate in fresh processes. The time is that of the first
answer to all requests. It includes compilation, with compiled programs cached on disk, but not loading the model. The
peer is first measured with several batch sizes; the fastest one is used. The result reports whether the answers are the
same. 5,000 rankings are measured in processes of their own, with fewer rounds. The peer runs in .venv-lm-eval, made by `make peers-lm-eval`.
"""

import json
import operator
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tests.benchmarks import case, compare

SIZES = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
}
KINDS = ("multiple_choice", "generate_until")


def run(
    *,
    rounds: int = 5,
    many_rounds: int = 2,
    documents: int = 120,
    many_documents: int = 1250,
    prompts: int = 32,
    new_tokens: int = 64,
    peer_batches: Sequence[int] = (1, 8, 32),
    sizes: Mapping[str, int] = SIZES,
) -> dict[str, Any]:
    """Alternates the sides `rounds` times on `documents` four-choice questions and `prompts` prompts to continue.

    Then alternates them `many_rounds` times on `many_documents` such questions.
    """
    with tempfile.TemporaryDirectory() as folder:
        _write(folder, sizes, documents, prompts, new_tokens)
        _write_many(folder, many_documents)
        programs = {"JAX_COMPILATION_CACHE_DIR": os.path.join(folder, "programs")}

        def ours(requests: str) -> list[str]:
            return compare.ours("jax.lm_eval_side", folder, requests)

        def theirs(requests: str, batch: str) -> list[str]:
            script = ("jax/lm_eval_side.py", folder, requests, batch)
            return compare.peer(*script, target="peers-lm-eval")

        env = {"ours": programs}
        # The first process fills the cache of compiled programs.
        first = compare.measured(ours("requests"), env=programs)
        choices = {
            batch: compare.measured(theirs("requests", batch)) for batch in map(str, peer_batches)
        }
        best = {kind: min(choices, key=lambda n: choices[n][kind]["seconds"]) for kind in KINDS}
        commands = {
            "ours": ours("requests"),
            **{n: theirs("requests", n) for n in sorted(set(best.values()))},
        }
        runs = compare.alternate_processes(commands, rounds, env=env)
        peers = [{kind: runs[best[kind]][i][kind] for kind in KINDS} for i in range(rounds)]
        reports = {"ours": runs["ours"], "peer": peers}
        compare.measured(ours("many"), env=programs)  # programs of further shapes
        many_commands = {"ours": ours("many"), "peer": theirs("many", best["multiple_choice"])}
        many = compare.alternate_processes(many_commands, many_rounds, env=env)
        return {
            "case": {
                **sizes,
                "documents": documents,
                "many_documents": many_documents,
                "choices": 4,
                "prompts": prompts,
                "new": new_tokens,
            },
            "peer_versions": choices[str(peer_batches[0])]["versions"],
            "other_load": [report["other_load"] for report in (*runs["ours"], *many["ours"])],
            **{kind: _compare(kind, reports, best[kind], first) for kind in KINDS},
            "multiple_choice_many": _compare("multiple_choice", many, best["multiple_choice"]),
        }


def _compare(
    kind: str,
    reports: Mapping[str, Sequence[Mapping[str, Any]]],
    batch: str,
    first: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    seconds = compare.each(reports, lambda report: report[kind]["seconds"])
    mine, theirs = (reports[side][0][kind]["answers"] for side in ("ours", "peer"))
    count = len(mine)
    result: dict[str, Any] = {
        "speed_over_peer": compare.ratio(seconds["peer"], seconds["ours"]),
        "requests_per_second": {
            side: [round(count / s, 2) for s in values] for side, values in seconds.items()
        },
        "ours_again_in_the_same_process": [
            round(count / report[kind]["again"], 2) for report in reports["ours"]
        ],
        "peer_batch_size": int(batch),
    }
    if first is not None:
        result["ours_without_compiled_programs"] = round(count / first[kind]["seconds"], 2)
    if kind == "generate_until":
        same = sum(map(operator.eq, mine, theirs))
        return {**result, "same_texts": same / count}
    (logprobs, greedy), (peer_logprobs, peer_greedy) = (
        zip(*x, strict=True) for x in (mine, theirs)
    )
    difference = compare.largest_difference(logprobs, peer_logprobs)
    return {**result, "largest_difference": difference, "same_greedy": greedy == peer_greedy}


def _write(
    folder: str, sizes: Mapping[str, int], documents: int, prompts: int, new_tokens: int
) -> None:
    """Writes model/ (a Hugging Face checkpoint), run/ (the import of model/) and requests.json."""
    from espalier.launch.convert import exchange

    model = pathlib.Path(folder, "model")
    text = _text()
    lines = text.splitlines(keepends=True)
    tokenizer = case.byte_level_bpe(lines, sizes["vocab_size"], "</s>")
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = case.hf_config(
        {},
        **{**sizes, "vocab_size": tokenizer.get_vocab_size()},
        max_position_embeddings=2048,
        **ends,
    )
    # Large weights, so that logits are far from uniform and no choice is a tie.
    case.write_model(model, config, case.normal(np.random.default_rng(0), 0.05))
    (model / "generation_config.json").write_text(json.dumps(ends))
    tokenizer.save(os.fspath(model / "tokenizer.json"))
    names = {f"{name}_token": "</s>" for name in ("bos", "eos", "pad")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    exchange.import_hf(os.fspath(model), os.path.join(folder, "run"))
    requests = _requests(text, documents, prompts, new_tokens)
    pathlib.Path(folder, "requests.json").write_text(json.dumps(requests))


def _write_many(folder: str, documents: int) -> None:
    """Writes many.json, with rankings alone."""
    requests = _requests(_text(), documents, 0, 0)
    rankings = {"multiple_choice": requests["multiple_choice"]}
    pathlib.Path(folder, "many.json").write_text(json.dumps(rankings))


def _text() -> str:
    """Returns the text of Python's language reference."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _requests(text: str, documents: int, prompts: int, new_tokens: int) -> dict[str, Any]:
    """Returns arguments of all requests by kind: passages of 20 to 120 words, with choices or generation settings."""
    rng = np.random.default_rng(1)
    words = text.split()

    def passage(low: int, high: int) -> str:
        length = int(rng.integers(low, high))
        start = int(rng.integers(0, len(words) - length))
        return " ".join(words[start : start + length])

    choices: list[list[Any]] = []
    for _ in range(documents):
        context = f"Question: {passage(20, 120)}\nAnswer:"
        choices += [[context, f" {passage(1, 9)}"] for _ in range(4)]
    options = {"until": ["\n\n"], "max_gen_toks": new_tokens, "do_sample": False}
    return {
        "multiple_choice": choices,
        "generate_until": [[passage(20, 120), options] for _ in range(prompts)],
    }
