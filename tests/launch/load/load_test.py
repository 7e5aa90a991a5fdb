"""A run in Python: logits, generation, several runs in one process, and a model of one's own as a run."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from espalier.data.tokenizers import vocabularies
from espalier.launch.config import model_file
from espalier.launch.inference import generate
from espalier.launch.load import hf_checkpoint
from espalier.launch.load.load import Run, load
from espalier.launch.load.loaded_run import LoadError
from espalier.model.config import TransformerConfig
from espalier.model.transformer import Transformer

SIZES = {"vocab_size": 264, "num_layers": 1, "embed_dim": 16, "num_heads": 2, "mlp_dim": 16}


@pytest.fixture(scope="module")
def run(trained_run):
    return load(trained_run.path)


@pytest.fixture(scope="module")
def own():
    """A model that was built without gin, and is not in a directory."""
    model = Transformer(config=TransformerConfig(**SIZES))
    variables = nn.meta.unbox(jax.jit(model.init)(jax.random.key(2), jnp.zeros((1, 4), jnp.int32)))
    params = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, variables["params"])
    return Run(model=model, params=params, vocabulary=vocabularies.byte())


def test_logits_are_those_of_the_model_on_any_number_of_rows(run, trained_run):
    tokens_BT = np.array([run.encode("import os"), run.encode("def f(x):")])
    assert tokens_BT[0, 0] == 0 and run.decode(tokens_BT[0, 1:]) == "import os"
    want = {
        name: jax.jit(trained_run.model.apply)({"params": params}, jnp.asarray(tokens_BT))
        for name, params in trained_run.params.items()
    }
    np.testing.assert_allclose(run.logits(tokens_BT), want["ema"], atol=1e-5)  # "auto"
    raw = load(trained_run.path, params="raw")
    np.testing.assert_allclose(raw.logits(tokens_BT[:1]), want["raw"][:1], atol=1e-5)


def test_generation_chooses_by_these_logits(run):
    prompt = run.encode("import ")
    (chosen,) = run.generate([prompt], max_new_tokens=3)
    tokens = list(prompt)
    for token, logprob in zip(chosen.tokens, chosen.logprobs, strict=True):
        logp_V = jax.nn.log_softmax(run.logits([tokens])[0, -1])
        assert token == int(logp_V[: run.vocabulary.vocab_size].argmax())
        np.testing.assert_allclose(logprob, logp_V[token], atol=1e-4)
        tokens.append(token)
    assert chosen.ended == "length" and chosen.text == run.decode(chosen.tokens)
    (without_start,) = run.generate([prompt[1:]], max_new_tokens=3)
    assert without_start == chosen


def test_further_prompts_use_the_programs_of_the_first(run, monkeypatch):
    settings = {"max_new_tokens": 2, "stop": "\n", "batch_size": 1}
    first = run.generate("import os", **settings)
    monkeypatch.setattr(generate, "decoder_and_texts", None)
    assert run.generate("import os", **settings) == first
    assert run.generate("def f(x)", **settings) != first
    monkeypatch.undo()
    assert len(run.generate("import os", **{**settings, "max_new_tokens": 1})[0].tokens) == 1


def test_samples_depend_on_the_seed_alone(run):
    settings = {"max_new_tokens": 4, "temperature": 1.0, "num_samples": 2, "stop": "\n"}
    samples = run.generate(["import ", "x"], seed=3, **settings)
    assert len(samples) == 4 and samples[0] != samples[1]
    assert run.generate("import ", seed=3, **settings) == samples[:2]
    assert run.generate("import ", seed=4, **settings) != samples[:2]


def test_runs_in_one_process_do_not_mix(run, own, tmp_path, trained_run):
    """A model is traced when it is first used, which may be after another was loaded."""
    own.save(tmp_path / "own")
    first, second = load(trained_run.path), load(tmp_path / "own")
    tokens = [run.encode("import os")]
    np.testing.assert_array_equal(first.logits(tokens), run.logits(tokens))
    np.testing.assert_array_equal(second.logits(tokens), own.logits(tokens))
    assert first.vocabulary.vocab_size == run.vocabulary.vocab_size


def test_a_saved_run_is_read_by_load_and_by_commands(own, command, tmp_path):
    folder = tmp_path / "own"
    own.save(folder, step=7)
    tokens = [own.encode("import os")]
    np.testing.assert_array_equal(load(folder).logits(tokens), own.logits(tokens))
    (tmp_path / "x.jsonl").write_text('{"text": "import os"}\n')
    files = [f"--inputs={tmp_path}/x.jsonl", f"--output={tmp_path}/y.jsonl"]
    assert command("score", f"--checkpoint={folder}/checkpoints/7", *files) == 0
    scored = json.loads((tmp_path / "y.jsonl").read_text())["logprobs"]
    logp_TV = jax.nn.log_softmax(own.logits(tokens)[0])
    want = [float(logp_TV[t, token]) for t, token in enumerate(tokens[0][1:])]
    np.testing.assert_allclose(scored, want, atol=1e-4)
    with pytest.raises(FileExistsError, match="already has a run"):
        own.save(folder)


def test_a_loaded_run_is_saved_with_other_parameters(run, trained_run, tmp_path):
    run.with_params(trained_run.params["raw"]).save(tmp_path / "raw")
    tokens = [run.encode("import os")]
    raw = load(trained_run.path, params="raw")
    np.testing.assert_allclose(load(tmp_path / "raw").logits(tokens), raw.logits(tokens), atol=1e-5)


def test_the_model_of_a_loaded_run_is_saved_in_a_run_of_its_own(run, trained_run, tmp_path):
    """It is written as its run recorded it; a copy of it as what its factories call."""
    params = trained_run.params["ema"]
    tokens = [run.encode("import os")]
    made = {}
    for name, model in (("same", run.model), ("copy", run.model.clone())):
        Run(model=model, params=params, vocabulary=run.vocabulary).save(tmp_path / name)
        made[name] = load(tmp_path / name)
        np.testing.assert_array_equal(made[name].logits(tokens), run.logits(tokens))
        assert made[name].model.config == run.model.config
    recorded = model_file.read(f"{trained_run.path}/model.json").gin()
    assert (tmp_path / "same" / "config.gin").read_text() == recorded
    # And once more, from the file that was written.
    copy = Run(model=made["copy"].model.clone(), params=params, vocabulary=run.vocabulary)
    copy.save(tmp_path / "again")
    again, first = (tmp_path / name / "config.gin" for name in ("again", "copy"))
    assert again.read_text() == first.read_text()


def test_generation_is_that_of_the_command(command, tmp_path, capsys):
    """By default, for a text that ends with a space: its last token is drawn anew with what follows."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat and the dog ran to the cat"] * 20),
        model_prefix=str(tmp_path / "m"),
        vocab_size=300,
        byte_fallback=True,
        model_type="bpe",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    vocabulary = vocabularies.from_file(path=tmp_path / "m.model")
    model = Transformer(config=TransformerConfig(**{**SIZES, "vocab_size": vocabulary.vocab_size}))
    variables = nn.meta.unbox(jax.jit(model.init)(jax.random.key(2), jnp.zeros((1, 4), jnp.int32)))
    params = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, variables["params"])
    mine = Run(model=model, params=params, vocabulary=vocabulary)
    mine.save(tmp_path / "run")
    (answer,) = mine.generate("the ")
    capsys.readouterr()
    assert command("generate", f"--checkpoint={tmp_path / 'run'}", "--prompt=the ") == 0
    assert capsys.readouterr().out.removesuffix("\n") == answer.text
    assert len(answer.tokens) == 128 or answer.ended == "eos"
    assert vocabulary.decode(answer.tokens[:1])[0] == " "
    (plain,) = mine.generate("the ", token_healing=False)
    assert plain.tokens != answer.tokens
    (of_tokens,) = mine.generate([mine.encode("the ")])
    assert of_tokens.tokens == plain.tokens


def test_texts_of_a_sentencepiece_model_without_bos_begin_with_none(run, tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat"] * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=30,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    assert not hf_checkpoint.write_record(tmp_path, run.model, tmp_path)["add_bos"]


def test_what_cannot_be_used_is_named(run, own, trained_run, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"run\.logits\(\[tokens\]\)"):
        run.logits(run.encode("import os"))
    for id in (-1, run.model.config.vocab_size):
        with pytest.raises(ValueError, match=f"'tokens' holds the id {id}, outside the model's"):
            run.logits([[1, 2, id]])
    with pytest.raises(LoadError, match="no chat template"):
        run.generate([[{"role": "user", "content": "Hello"}]])
    with pytest.raises(LoadError, match=r"vocabulary=vocabularies\.byte\(\)"):
        Run(model=own.model, params=own.params).encode("x")
    with pytest.raises(LoadError, match="another vocabulary"):
        load(trained_run.path, vocabulary=vocabularies.byte(extra_ids=2)).encode("x")
