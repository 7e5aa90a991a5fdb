"""Influence over pre-training in its order: several checkpoints of one run, and the files of the sequences that it read.

The checkpoints are directories of Hugging Face, one for each step, as Pythia's are.
"""

import functools
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from espalier.launch.influence import fit, score, sources
from espalier.launch.influence.report import report
from espalier.launch.load.load_run import LoadError
from espalier.model.hf.registry import family_named
from tests.data.rows import sequence_files
from tests.model.hf import arrays

TOKENS, STEP, STEPS, VOCABULARY = 17, 4, 6, 40
PLANTED, FACT = 9, [31, 32, 33, 34, 35, 36]  # sequence 9 is of step 2
CONFIG = {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "use_parallel_residual": True,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


class Run:
    """A run of some steps over sequences in their order, with a checkpoint of two of the steps."""

    def __init__(self, folder):
        self.folder = folder
        rng = np.random.default_rng(0)
        rows = rng.integers(1, 30, (STEP * STEPS, TOKENS)).astype(np.uint16)
        rows[PLANTED, 4:10] = FACT  # in the middle, between other documents
        self.rows = rows
        self.sequences = sequence_files.write(folder / "document", rows)
        self.queries = str(folder / "q.jsonl")
        pathlib.Path(self.queries).write_text(
            json.dumps({"prompt": FACT[:3], "completion": FACT[3:]}) + "\n"
        )
        family = family_named(CONFIG["model_type"])
        model = family.model(CONFIG)
        params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, TOKENS - 1), jnp.int32))
        params = jax.tree.map(np.asarray, jax.device_get(nn_unbox(params))["params"])
        optimizer = optax.adam(1e-2)
        state = optimizer.init(params)

        @jax.jit
        def train(params, state, rows):
            def loss(params):
                logits = model.apply({"params": params}, rows[:, :-1])
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
                return losses.mean()

            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return optax.apply_updates(params, updates), state

        self.checkpoints = []
        for step in range(STEPS):
            batch = jnp.asarray(rows[step * STEP : (step + 1) * STEP], jnp.int32)
            params, state = train(params, state, batch)
            if step in (3, 5):
                place = folder / f"step{step + 1}"
                place.mkdir()
                (place / "config.json").write_text(json.dumps(family.config(model)))
                tensors = arrays.to_hf(family, model, jax.device_get(params))
                safetensors.numpy.save_file(tensors, place / "model.safetensors")
                self.checkpoints.append(str(place))

    def flags(self, *more):
        of_files = (f"--sequences={self.sequences}", f"--sequence_tokens={TOKENS}")
        return [*of_files, f"--step_sequences={STEP}", "--batch_size=8", *more]


def nn_unbox(tree):
    import flax.linen as nn

    return nn.meta.unbox(tree)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("order"))
    both = f"--checkpoints={','.join(run.checkpoints)}"
    flags = run.flags(both, f"--out={run.folder}/factors", "--sweep_documents=0")
    assert fit.main(flags) == 0
    return run


def read(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def test_several_checkpoints_rank_a_planted_sequence_first_and_name_its_step(run, capsys):
    out = run.folder / "scores.jsonl"
    both = (f"--checkpoints={','.join(run.checkpoints)}", f"--factors={run.folder}/factors")
    flags = run.flags(*both, f"--queries={run.queries}", f"--out={out}", "--top=3")
    assert score.main(flags) == 0
    assert "24 documents have the scores of 2 checkpoints" in capsys.readouterr().out
    rows = read(out)
    assert [row["sequence"] for row in rows] == list(range(STEP * STEPS))
    assert [row["step"] for row in rows] == [i // STEP for i in range(STEP * STEPS)]
    assert max(range(len(rows)), key=lambda i: rows[i]["scores"][0]) == PLANTED
    parts = [read(f"{out}.{name}") for name in ("step4", "step6")]
    for row, *own in zip(rows, *parts, strict=True):
        assert row["by_checkpoint"] == [x["scores"] for x in own]
        np.testing.assert_allclose(row["scores"], np.mean([x["scores"] for x in own], 0))
        np.testing.assert_allclose(row["norm"], np.mean([x["norm"] for x in own]))
    assert not np.allclose(*np.moveaxis([row["by_checkpoint"] for row in rows], 1, 0))
    assert score.main([*flags, "--checkpoint_weights=1,2"]) == 2
    assert "has scores of other checkpoint_weights" in capsys.readouterr().err
    table, _ = report(str(out), top=3)
    (query,) = table["queries"]
    top = query["top"][0]
    assert (top["document"], top["step"]) == (PLANTED, PLANTED // STEP)
    assert top["text"].split() == [str(token) for token in run.rows[PLANTED]]


def test_tracin_adds_dot_products_by_learning_rates_over_the_steps_of_a_range(run, capsys):
    """arXiv 2002.08484, equation 1, with autodiff's gradients of the MLP's matrices."""
    out = run.folder / "tracin.jsonl"
    both = (f"--checkpoints={','.join(run.checkpoints)}", "--checkpoint_weights=3e-4,1e-4")
    steps = ("--first_step=2", "--end_step=4", "--method=identity", "--rank=0")
    flags = run.flags(*both, *steps, f"--queries={run.queries}", f"--out={out}")
    assert score.main(flags) == 0
    rows = read(out)
    assert [row["sequence"] for row in rows] == list(range(8, 16))
    family = family_named(CONFIG["model_type"])
    model = family.model(CONFIG)

    @functools.partial(jax.jit, static_argnames="first")
    def gradient(params, ids, first):
        def loss(params):
            log_probs = jax.nn.log_softmax(model.apply({"params": params}, ids[None, :-1])[0])
            return -log_probs[jnp.arange(len(ids) - 1), ids[1:]][first:].sum()

        flat = jax.tree_util.tree_leaves_with_path(jax.grad(loss)(params))
        return jnp.concatenate([jnp.ravel(x) for path, x in flat if "'mlp'" in str(path)])

    expected = np.zeros(8)
    for checkpoint, rate in zip(run.checkpoints, (3e-4, 1e-4), strict=True):
        tensors = safetensors.numpy.load_file(f"{checkpoint}/model.safetensors")
        params = arrays.to_native(family, model, tensors)
        asked = gradient(params, jnp.asarray(FACT), first=2)
        each = (jnp.asarray(row, jnp.int32) for row in run.rows[8:16])
        expected += [rate * float(gradient(params, row, first=0) @ asked) for row in each]
    np.testing.assert_allclose([row["scores"][0] for row in rows], expected, rtol=2e-3, atol=1e-8)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--sequence_tokens=16"], "sequence 0 has 17 tokens, and 16 are expected"),
        (["--first_step=6"], "must choose steps of the 6 that 24 sequences are, 4 each"),
        (["--end_step=7"], "--first_step=0 and --end_step=7 must choose steps of the 6"),
        (["--step_sequences=0"], "--step_sequences=0 must be at least 1"),
        (["--documents=q.jsonl"], "by one of --documents=FILE, --mixture=NAME and --sequences"),
        (["--sequences=nowhere"], "nowhere.bin: there is no such file"),
    ],
)
def test_sequences_that_do_not_fit_are_refused_by_name(run, capsys, more, words):
    flags = run.flags(f"--checkpoint={run.checkpoints[0]}", f"--out={run.folder}/wrong", *more)
    assert fit.main(flags) == 2
    printed = capsys.readouterr().err
    assert words in printed and printed.count("error:") == 1 and "Traceback" not in printed


def test_tokens_of_another_vocabulary_are_refused(run, tmp_path, capsys):
    name = sequence_files.write(tmp_path / "d", np.full((4, TOKENS), VOCABULARY, np.uint16))
    own = run.flags(f"--sequences={name}", f"--checkpoint={run.checkpoints[0]}")
    assert fit.main([*own, f"--out={tmp_path}/factors"]) == 2
    assert "sequence 0 has the token 40, and the model 40 tokens" in capsys.readouterr().err


def test_more_tokens_than_learned_positions_are_refused():
    model = types.SimpleNamespace(max_length=32)
    run = types.SimpleNamespace(model=model)
    assert sources.length_of(run, 33) == 32
    with pytest.raises(
        LoadError, match="the model reads 32 positions, and these sequences have 33"
    ):
        sources.length_of(run, 34)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--checkpoints={0}"], "is one checkpoint: give it as --checkpoint"),
        (["--checkpoints={0},{0}"], "each folder must have a name of its own, and 'step4' is not"),
        (["--checkpoints={0},{1}", "--checkpoint={0}"], "Give either --checkpoint=DIR or"),
        (["--checkpoints={0},{1}", "--checkpoint_weights=1"], "must be 2 numbers above 0"),
        (["--checkpoints={0},{1}", "--checkpoint_weights=1,x"], "must be 2 numbers above 0"),
        (["--checkpoint={0}", "--checkpoint_weights=1,2"], "add --checkpoints=DIR,DIR"),
        (["--checkpoints={0},{1}", "--beam_pipeline_options=a"], "scores by one checkpoint"),
        (["--first_step=1", "--checkpoint={0}"], "--first_step is of sequences"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused_by_name(run, tmp_path, capsys, more, words):
    own = ["--method=identity", f"--queries={run.queries}", f"--out={tmp_path}/s.jsonl"]
    own += run.flags() if more[0][2:7] == "check" else [f"--documents={run.queries}"]
    assert score.main([*own, *(flag.format(*run.checkpoints) for flag in more)]) == 2
    assert words in capsys.readouterr().err
