"""The model card of an export says what the run's record says, and no more."""

import json

from etils import epath

from espalier.launch.convert import model_card

PHASES = [
    {"first_step": 0, "tokens_per_step": 100.0},
    {"first_step": 10, "tokens_per_step": 50.0},
]


def run(folder, config, rows=(), **record):
    (folder / "checkpoints" / "20").mkdir(parents=True)
    (folder / "config.gin").write_text(config)
    if record:
        (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return epath.Path(folder / "checkpoints" / "20")


def card(tmp_path, step, meta=None, architecture="LlamaForCausalLM", **files):
    out = tmp_path / "export"
    out.mkdir()
    for name, text in files.items():
        (out / f"{name}.json").write_text(text)
    model_card.write(
        str(out),
        step.parent.parent,
        {"step": 20, "meta": meta or {}},
        weights="llama, 1,000 parameters in float32, 0.1 MB",
        architecture=architecture,
        average=False,
    )
    return (out / "README.md").read_text()


def test_the_card_of_a_trained_run(tmp_path):
    parent = run(tmp_path / "base", "recipe.Recipe.objective = @lm.language_modelling\n")
    rows = [
        {"step": 20, "loss": 1.0, "epochs/pairs": 0.5},
        {"step": 20, "eval/pairs/loss": 0.625, "eval/pairs/pairs": 8.0},
        {"step": 40, "eval/pairs/loss": 0.5, "eval/pairs/pairs": 8.0},
    ]
    step = run(
        tmp_path / "dpo",
        "LOSSES = [@direct.dpo, @terms.nll]\nrecipe.Recipe.objective = @preference.preference\n",
        rows,
        commit="0123456789abcdef",
        initial={"path": str(parent)},
        data={"phases": PHASES, "sources": {"pairs": {"tokens": 1234}}},
    )
    meta = {"hf": {"family": "llama"}, "start_token": 0}
    text = card(
        tmp_path, step, meta, tokenizer="{}", tokenizer_config='{"chat_template": "{{ messages }}"}'
    )
    assert text.startswith("---\nlibrary_name: transformers\n") and "# dpo\n" in text
    for line in (
        "| weights | llama, 1,000 parameters in float32, 0.1 MB |",
        "| architecture | `LlamaForCausalLM` |",
        "| objective | preference (dpo, nll) |",
        "| trained | 20 updates on about 1,500 tokens with a loss |",
        "| held-out loss | pairs 0.625 per pair, at step 20 |",
        "| parents | `base`, step 20 (language modelling); a checkpoint in Hugging Face format of the family llama |",
        "| code | Espalier, commit `0123456789ab` |",
        "| `pairs` | 1,234 | 0.5 |",
    ):
        assert line in text.splitlines()
    assert "apply_chat_template" in text and "token 0 before every document" in text
    assert "**To be filled in.**" in text and str(tmp_path) not in text


def test_the_card_of_an_encoder_decoder_loads_one_and_puts_no_token_before_texts(tmp_path):
    step = run(tmp_path / "t5", "")
    text = card(tmp_path, step, {"start_token": 0}, architecture="T5ForConditionalGeneration")
    assert "before every document" not in text
    assert "model = AutoModelForSeq2SeqLM.from_pretrained" in text and "CausalLM" not in text


def test_a_run_without_a_record_or_with_a_damaged_one_has_a_card_too(tmp_path, capsys):
    step = run(tmp_path / "imported", "")
    text = card(tmp_path, step, {"hf": {"family": "gemma2"}})
    assert "| trained | no training is recorded |" in text and "No data are recorded" in text
    assert "the family gemma2" in text and "takes token ids" in text
    (tmp_path / "export" / "README.md").unlink()
    (tmp_path / "export").rmdir()
    text = card(tmp_path, step, {"made_of": ["tuned, step 12"]})
    assert "| parents | made of tuned, step 12 |" in text
    (tmp_path / "export" / "README.md").unlink()
    (tmp_path / "export").rmdir()
    assert "| parents | not recorded |" in card(tmp_path, step)
    (tmp_path / "export" / "README.md").unlink()
    (tmp_path / "export").rmdir()
    (tmp_path / "imported" / "run.json").write_text('{"data": [1], "initial": 3, "commit": 5}')
    assert "| trained | 20 updates |" in card(tmp_path, step)
    (tmp_path / "export" / "README.md").unlink()
    (tmp_path / "export").rmdir()
    (tmp_path / "imported" / "run.json").write_text("{")
    assert "| trained | no training is recorded |" in card(tmp_path, step)
    assert "README.md is incomplete" in capsys.readouterr().err
