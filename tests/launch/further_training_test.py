"""An imported model is trained further on a user's files, used and exported again."""

import json

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from espalier.launch.convert import __main__ as convert
from espalier.model.hf.files.safetensors_files import SafetensorsReader, SafetensorsWriter
from espalier.model.hf.registry import family_of_config
from espalier.trainers.checkpoints import step_dir

BOS, EOS = 256, 257
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 264,
    "tie_word_embeddings": True,
    "max_position_embeddings": 99,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


def write_checkpoint(folder):
    """A random Llama with a tokenizer of bytes, that begins texts with BOS."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    family = family_of_config(CONFIG)
    shapes = family.shapes(family.model(CONFIG))
    draw = np.random.default_rng(0).standard_normal
    tensors = {name: draw(shape, np.float32) for name, shape in shapes.items()}
    described = {name: (x.dtype, x.shape) for name, x in tensors.items()}
    with SafetensorsWriter(folder, described, shard_bytes=10**9) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({text: id for id, text in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tensors


def test_an_imported_model_is_trained_further_and_exported(train, command, tmp_path):
    tensors = write_checkpoint(tmp_path / "hf")
    imported, run = tmp_path / "imported", tmp_path / "run"
    assert convert.main([f"--from_hf={tmp_path}/hf", f"--to={imported}"]) == 0
    texts = [json.dumps({"text": f"the number {i} of a lattice"}) + "\n" for i in range(40)]
    (tmp_path / "x.jsonl").write_text("".join(texts))
    ended = train(
        f"--gin_file={imported}/config.gin",
        "--gin_file=t5x_configs/data/hf_files.gin",
        "--gin_file=t5x_configs/runs/pretrain.gin",
        f"--gin.FILES='{tmp_path}/x.jsonl'",
        f"--gin.TOKENIZER='{imported}/tokenizer'",
        f"--gin.INITIAL_CHECKPOINT_PATH='{imported}'",
        f"--gin.MODEL_DIR='{run}'",
        "--gin.MIXTURE_OR_TASK_NAME='files'",
        f"--gin.DOCUMENT_START={BOS}",
        "--gin.TASK_FEATURE_LENGTHS={'targets': 32}",
        "--gin.BATCH_SIZE=8",
        "--gin.VALIDATION_FRACTION=0.1",
        "--gin.TRAIN_STEPS=2",
        "--gin.LEARNING_RATE=1e-3",
    )
    assert ended.status == 0, ended.err
    assert "has no effect" not in ended.err

    # Its first update began at the imported weights: AdamW moves each of them by about the rate.
    assert convert.main([f"--from={run}", f"--to_hf={tmp_path}/back"]) == 0
    with SafetensorsReader(tmp_path / "back") as reader:
        back = {name: reader.read(name) for name in reader.tensors}
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        moved = np.abs(back[name] - tensor)
        assert 0 < moved.max() < 4e-3, name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    kept = ("max_position_embeddings", "bos_token_id", "eos_token_id", "rope_theta")
    assert {key: config[key] for key in kept} == {key: CONFIG[key] for key in kept}

    # Texts are read as in training: BOS once, before the document.
    assert step_dir.read_meta(run)["start_token"] == BOS
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    rows = {
        "text": {"text": "the"},
        "tokens": {"tokens": [BOS, *tokenizer.encode("the", add_special_tokens=False).ids]},
    }
    scored = []
    for checkpoint, key, *flags in (
        (imported, "text"),
        (run, "text"),
        (run, "tokens", "--gin.START_TOKEN=None"),
    ):
        (tmp_path / "s.jsonl").write_text(json.dumps(rows[key]) + "\n")
        target = tmp_path / f"{len(scored)}.jsonl"
        files = (f"--inputs={tmp_path}/s.jsonl", f"--output={target}")
        assert command("score", f"--checkpoint={checkpoint}", *files, *flags) == 0
        scored.append(json.loads(target.read_text())["logprobs"])
    assert [len(row) for row in scored] == [3, 3, 3]
    np.testing.assert_allclose(scored[1], scored[2], atol=1e-6)
