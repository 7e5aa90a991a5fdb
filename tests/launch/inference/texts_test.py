"""Token healing against all continuations of a tiny vocabulary, one by one, and in `generate`; how continuations are compared."""

import itertools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.launch.inference.texts import Agreement, TokenHealing
from espalier.model.config import TransformerConfig
from espalier.model.transformer import Transformer
from espalier.trainers.decoding.decoder import Decoder
from espalier.trainers.decoding.settings import Beams, Sampling, Settings

TEXTS = ("c", "", "a", "b", " ", " a", " ab", "ab")  # of EOS, and of seven pieces
V, M, EOS = len(TEXTS), 3, 1


class Vocabulary:
    """Seven pieces, spelled as SentencePiece spells them."""

    vocab_size = V
    spellings = {id: text.replace(" ", "\u2581") for id, text in enumerate(TEXTS) if text}

    def decode(self, ids):
        return "".join(TEXTS[id] for id in ids)


@pytest.fixture(scope="module")
def model():
    config = TransformerConfig(
        vocab_size=V, num_layers=1, embed_dim=8, num_heads=1, num_kv_heads=1, mlp_dim=8
    )
    model = Transformer(config=config)
    params = jax.jit(model.init)(jax.random.key(3), jnp.zeros((1, 4), jnp.int32))
    return model, jax.tree.map(lambda x: x * 3.0, nn.meta.unbox(params)["params"])


@pytest.fixture(scope="module")
def continuations(model):
    """{new tokens: (text, log-probabilities)} of all continuations of `cb` whose text begins with a space."""
    module, params = model
    every = np.array(list(itertools.product(range(V), repeat=M)), np.int32)
    rows = np.concatenate([np.tile([0, 3], (len(every), 1)), every], axis=1)
    logits = np.asarray(jax.jit(module.apply)({"params": params}, rows), np.float64)[:, 1:-1]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(logp, every[:, :, None], axis=2)[:, :, 0]
    found = {}
    for tokens, each in zip(every.tolist(), chosen, strict=True):
        length = tokens.index(EOS) + 1 if EOS in tokens else M
        text = "".join(TEXTS[id] for id in tokens[:length])
        if text.startswith(" "):
            found[tuple(tokens[:length])] = (text, each[:length])
    return found


def healed():
    """The prompt `cb `, healed, as arguments of a decoder."""
    prompt = TokenHealing(Vocabulary())([0, 3, 4])
    assert (prompt.tokens, prompt.first, prompt.text) == ([0, 3], (4, 5, 6), " ")
    return {"prompts": [prompt.tokens], "first": [prompt.first]}


def test_samples_are_drawn_from_the_model_on_condition_of_the_text(model, continuations):
    count = 4000
    settings = Settings(
        max_new_tokens=M,
        num_samples=count,
        eos_ids=(EOS,),
        sampling=Sampling(temperature=1.0),
    )
    # A second prompt, longer and free to begin with any token, is drawn in the same batch.
    arguments = healed()
    both = {"prompts": [*arguments["prompts"], [0, 2, 3]], "first": [*arguments["first"], None]}
    drawn = list(Decoder(*model, settings, batch_size=2).stream(**both))
    assert {row.tokens[0] for row in drawn[count:]} == set(range(V))
    weights = {tokens: np.exp(logp.sum()) for tokens, (_, logp) in continuations.items()}
    total = sum(weights.values())
    assert 0.01 < total < 0.9  # the condition excludes much
    counts = dict.fromkeys(weights, 0)
    for row in drawn[:count]:
        counts[tuple(row.tokens)] += 1
        want = continuations[tuple(row.tokens)][1]  # of the model, without the condition
        np.testing.assert_allclose(row.log_probs, want, atol=2e-5)
    for tokens, weight in weights.items():
        share = weight / total
        assert abs(counts[tokens] / count - share) < 5 * np.sqrt(share / count), tokens


def test_greedy_and_beams_begin_with_the_text(model, continuations):
    settings = Settings(max_new_tokens=M, eos_ids=(EOS,))
    (row,) = Decoder(*model, settings, batch_size=1).stream(**healed())
    # Token by token the most probable one among those that go on with a valid continuation.
    tokens = ()
    while tokens not in continuations:
        place = len(tokens)
        going_on = {t: v for t, v in continuations.items() if t[:place] == tokens}
        tokens = max(going_on, key=lambda t, place=place: going_on[t][1][place])[: place + 1]
    assert tuple(row.tokens) == tokens
    every = Beams(num_beams=V * V, length_penalty=0.0)
    (best,) = Decoder(
        *model, Settings(max_new_tokens=M, eos_ids=(EOS,), beams=every), batch_size=1
    ).stream(**healed())
    want = max(continuations, key=lambda tokens: continuations[tokens][1].sum())
    assert tuple(best.tokens) == want
    np.testing.assert_allclose(best.score, continuations[want][1].sum(), atol=2e-5)


@pytest.mark.parametrize("prompt", [[4], [0, 3, 3], [0, 6], [0, 3, EOS], [0]])
def test_other_prompts_stay_as_they_are(prompt):
    """One token, pieces that no longer piece begins with, and special tokens."""
    new = TokenHealing(Vocabulary())(prompt)
    assert (new.tokens, new.first, new.text) == (prompt, None, "")


class Words:
    """Bytes as in SeqIO, and two pieces that begin with a space."""

    pieces = {259: " os", 260: " sys, re"}
    vocab_size = 261
    eos_id = 1
    spellings = {**{b + 3: chr(b) for b in range(128)}, **pieces}

    def encode(self, text):
        return [byte + 3 for byte in text.encode()]

    def decode(self, ids):
        parts = [self.pieces.get(id, "").encode() or bytes([id - 3]) for id in ids if id >= 3]
        return b"".join(parts).decode("utf-8", "ignore")


def test_texts_go_on_after_the_prompt(trained_run, command, monkeypatch, tmp_path, capsys):
    from espalier.launch.load.loaded_run import LoadedRun

    monkeypatch.setattr(LoadedRun, "vocabulary_or_none", Words())
    inputs, output = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
    prompts = [{"text": "import "}, {"text": "import"}, {"tokens": [*Words().encode("import ")]}]
    inputs.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    flags = (f"--checkpoint={trained_run.path}", "--max_new_tokens=5", "--eos_id=-1")

    def generate(*more):
        files = (f"--inputs={inputs}", f"--output={output}")
        assert command("generate", *flags, *files, *more) == 0
        return [json.loads(line) for line in output.read_text().splitlines()]

    sampling = ("--temperature=1", "--num_samples=30", "--seed=1")
    rows = generate(*sampling, "--token_healing")
    healed = rows[:30]
    first = {row["tokens"][0] for row in healed}
    assert first <= {35, 259, 260} and len(first) > 1
    for row in healed:
        assert row["prompt"] == "import "
        assert " " + row["text"] == Words().decode(row["tokens"])
    assert "end with a space" not in capsys.readouterr().err
    plain = generate(*sampling)
    assert "1 of 2 texts end with a space" in capsys.readouterr().err
    assert not {row["tokens"][0] for row in plain[:30]} <= {35, 259, 260}
    assert plain[30:] == rows[30:]  # other prompts
    # What the prompt has is no part of a stop, and is not shown.
    text = next(row["text"] for row in healed if row["tokens"][0] == 260)
    assert text.startswith("sys, re")
    row = next(i for i, row in enumerate(healed) if row["tokens"][0] == 260)
    stopped = generate(*sampling, "--token_healing", "--stop=, re", "--stop= sys")
    assert stopped[row]["text"] == "sys" and stopped[row]["tokens"] == [260]
    greedy = generate("--token_healing")[0]["text"]
    capsys.readouterr()
    assert command("generate", *flags, "--prompt=import ", "--stream") == 0
    assert capsys.readouterr().out == f"{greedy}\n"


def test_the_sentence_says_which_continuations_differ():
    agreement = Agreement()
    assert agreement.add([1, 2], [1, 3]) == 1
    assert str(agreement) == (
        "0 of 1 continuations equal the full cache's; all differ after 1.0 tokens on average"
    )
    agreement.add([1], [1])
    assert str(agreement).startswith(
        "1 of 2 continuations equal the full cache's; the others differ"
    )
