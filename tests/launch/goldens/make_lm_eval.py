"""Tiny models, and what lm-evaluation-harness's Hugging Face backend answers with them.

The goldens beside this file (lm_eval/, for tests/launch/lm_eval/model_test.py) are made from the root by

  .venv/bin/python tests/launch/goldens/make_lm_eval.py models
  .venv-lm-eval/bin/python tests/launch/goldens/make_lm_eval.py answers

the second after `make peers-lm-eval`. Other random models, compared at once:

  .venv/bin/python tests/launch/goldens/make_lm_eval.py models --out=/tmp/harness --seed=7
  .venv-lm-eval/bin/python tests/launch/goldens/make_lm_eval.py answers --out=/tmp/harness
  LM_EVAL_CASES=/tmp/harness .venv/bin/python -m pytest -q tests/launch/lm_eval/model_test.py

`models` draws weights (float16 values, so that files are small and exact), trains a tokenizer for each
model, and takes both through launch.convert into a run and out again. `answers` evaluates the exported
models on the tasks in lm_eval/tasks: per sample what the model answered, and the metrics.
"""

import argparse
import json
import os
import pathlib
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np

HERE = pathlib.Path(__file__).parent / "lm_eval"
SYSTEM = "You answer in few words."
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
RUNS = {
    "plain": (("words", "letters", "texts", "answers"), {}),
    "chat": (
        ("words_2shot", "answers"),
        {
            "apply_chat_template": True,
            "fewshot_as_multiturn": True,
            "system_instruction": SYSTEM,
        },
    ),
}


def configs(rng: np.random.Generator, vocab: int) -> dict[str, dict]:
    """config.json of each model: one that begins texts with BOS, one with learned positions."""
    heads = int(rng.integers(1, 3))
    llama = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": 16 * heads,
        "intermediate_size": int(rng.integers(20, 50)),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "num_attention_heads": 2 * heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 160,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    gpt2 = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocab,
        "n_embd": 24,
        "n_head": 3,
        "n_layer": int(rng.integers(1, 3)),
        "n_inner": int(rng.integers(20, 50)),
        "n_positions": 96,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    return {"llama": llama, "gpt2": gpt2}


def write_tokenizer(folder: pathlib.Path, *, adds_bos: bool, size: int) -> int:
    """A byte-level BPE tokenizer of the tasks' own texts; returns the number of entries."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [path.read_text("utf-8") for path in sorted((HERE / "tasks").glob("*.jsonl"))]
    tokenizer.train_from_iterator(texts, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>" if adds_bos else "</s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "chat_template": CHAT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return tokenizer.get_vocab_size()


def make_models(out: pathlib.Path, seed: int) -> None:
    """Writes `out`/NAME/model for each model."""
    from safetensors.numpy import save_file

    from espalier.launch.convert import __main__ as convert
    from espalier.model.hf.registry import family_of_config

    rng = np.random.default_rng(seed)
    for name in ("llama", "gpt2"):
        with tempfile.TemporaryDirectory() as work:
            source = pathlib.Path(work, "source")
            source.mkdir()
            vocab = write_tokenizer(source, adds_bos=name == "llama", size=330)
            config = configs(rng, vocab)[name]
            family = family_of_config(config)
            shapes = family.shapes(family.model(config))
            tensors = {}
            for key, shape in sorted(shapes.items()):
                # Far from uniform, so that no choice is a tie; gains stay near 1.
                scale, mean = (0.1, 1.0) if "norm" in key or "ln_" in key else (0.45, 0.0)
                values = rng.normal(0.0 if key.endswith("bias") else mean, scale, shape)
                tensors[key] = values.astype(np.float16)
            save_file(tensors, source / "model.safetensors")
            (source / "config.json").write_text(json.dumps(config))
            generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": 1}
            if name == "gpt2":
                generation["repetition_penalty"] = 1.3
            (source / "generation_config.json").write_text(json.dumps(generation))
            run, exported = f"{work}/run", out / name / "model"
            exported.parent.mkdir(parents=True, exist_ok=True)
            assert convert.main([f"--from_hf={source}", f"--to={run}"]) == 0
            assert convert.main([f"--from={run}", f"--to_hf={exported}"]) == 0


def make_answers(out: pathlib.Path) -> None:
    """Writes `out`/NAME/answers.json for each model."""
    import lm_eval
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(HERE / "tasks"), include_defaults=False)
    for folder in sorted(path for path in out.iterdir() if (path / "model").is_dir()):
        # One at a time: in a batch the peer reads on after a stop text until all rows have ended, and
        # counts padding among the tokens that its repetition penalty has seen.
        model = HFLM(str(folder / "model"), device="cpu", dtype="float32", batch_size=1)
        found = {
            "versions": {
                "lm_eval": lm_eval.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        }
        for run, (tasks, options) in RUNS.items():
            results = lm_eval.simple_evaluate(
                model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **options
            )
            found[run] = {
                task: {
                    "samples": [
                        {"arguments": sample["arguments"], "answers": sample["resps"]}
                        for sample in sorted(results["samples"][task], key=lambda s: s["doc_id"])
                    ],
                    "metrics": {
                        key: value
                        for key, value in results["results"][task].items()
                        if isinstance(value, float) and "stderr" not in key
                    },
                }
                for task in tasks
            }
        text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
        (folder / "answers.json").write_text(text, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("models", "answers"))
    parser.add_argument("--out", type=pathlib.Path, default=HERE)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    if flags.what == "models":
        make_models(flags.out, flags.seed)
    else:
        make_answers(flags.out)


if __name__ == "__main__":
    main()
