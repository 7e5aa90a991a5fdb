"""Best-of-n over files of samples, and the pairs that it makes."""

import functools
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.data.preference import stream
from espalier.data.preference.tasks import register_pairs
from espalier.data.stream.rows import vocabulary_digest
from espalier.data.tokenizers import vocabularies
from espalier.launch.config import gin_config
from espalier.launch.load.load_run import RunConfig
from espalier.launch.load.loaded_run import LoadedRun
from espalier.launch.prepare import best_of_n
from espalier.launch.run import model_record, run_vocabulary
from espalier.model import axes
from espalier.model.config import TransformerConfig
from espalier.model.heads.reward_model import RewardModel
from espalier.model.transformer import Transformer
from espalier.trainers import initialise, partitioning
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.checkpoints.checkpoint import Checkpointer
from espalier.trainers.preference.indicators.samples import Texts
from espalier.trainers.preference.objectives.reward import bradley_terry
from espalier.trainers.rewards.base import Completion
from espalier.trainers.rewards.model_reward import CheckpointReward, ModelReward

GOLDENS = pathlib.Path(__file__).parents[2] / "data" / "goldens"


def rows(texts, prompt="1 + 1 = ", answer="2", **more):
    return [
        {"prompt": prompt, "answer": answer, "sample": i, "text": text, "ended": "eos", **more}
        for i, text in enumerate(texts)
    ]


@pytest.fixture
def command(tmp_path):
    """Runs the command on rows; returns its status and what it wrote."""

    def run(given, *more, reward="exact_answer"):
        inputs = tmp_path / "samples.jsonl"
        inputs.write_text("".join(json.dumps(row) + "\n" for row in given))
        files = {name: tmp_path / f"{name}.jsonl" for name in ("output", "pairs")}
        outputs = [f"--{name}={path}" for name, path in files.items()]
        status = best_of_n.main([f"--inputs={inputs}", f"--reward={reward}", *outputs, *more])
        found = [
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else None
            for path in files.values()
        ]
        return status, *found

    return run


def test_the_best_samples_are_kept_and_paired_with_the_worst(command, capfd):
    chat = [{"role": "user", "content": "one and one?"}]
    status, best, pairs = command(
        [
            *rows(["3", "2", "2", "4"]),
            *rows(["5", "5"], prompt="2 + 3 = ", answer="5"),
            *rows(["no", "2"], prompt=chat),
        ]
    )
    assert status == 0
    assert [row["text"] for row in best] == ["2", "5", "2"]
    assert [row["sample"] for row in best] == [1, 0, 1]
    assert best[0]["rewards"] == [0, 1, 1, 0] and best[0]["best_of"] == 4
    told = {"answer": "2", "chosen_reward": 1.0, "rejected_reward": 0.0}
    turns = [[{"role": "assistant", "content": text}] for text in ("2", "no")]
    assert pairs == [
        {"prompt": "1 + 1 = ", "chosen": "2", "rejected": "3", **told},
        {"prompt": chat, "chosen": turns[0], "rejected": turns[1], **told},
    ]
    said = capfd.readouterr().err
    assert "3 prompts: mean reward 0.6667, of the best 1; 1 prompts with equal rewards" in said
    assert f"best of 4 {math.log(4) - 0.75:.3f} nats at most" in said


def test_samples_that_were_cut_are_used_on_request_alone(command, capfd):
    """Training would end them with EOS."""
    given = [*rows(["2", "3"]), *rows(["5", "5", "4"], prompt="2 + 3 = ", answer="5")]
    for i in (0, 2):
        given[i]["ended"] = "length"
    status, best, pairs = command(given)
    assert status == 0
    assert [(row["sample"], row["rewards"], row["best_of"]) for row in best] == [
        (1, [0.0], 1),
        (1, [1.0, 0.0], 2),
    ]
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [("5", "4")]
    assert "2 cut samples and 0 prompts without others are not used" in capfd.readouterr().err
    _, best, pairs = command(given, "--keep_cut")
    assert [row["sample"] for row in best] == [0, 0] and len(pairs) == 2
    assert "2 cut samples are used" in capfd.readouterr().err
    status, best, pairs = command([*given[:1], *rows(["7"], prompt="3 + 4 = ", answer="7")])
    assert status == 0 and [row["prompt"] for row in best] == ["3 + 4 = "] and pairs == []
    assert "1 cut samples and 1 prompts without others" in capfd.readouterr().err


def test_texts_that_were_cut_are_penalised(command):
    given = rows(["2", "2"])
    given[0]["ended"] = "length"
    _, best, _ = command(given, "--missing_end_penalty=0.5", "--keep_cut")
    assert best[0]["rewards"] == [0.5, 1.0] and best[0]["sample"] == 1


HEADED = """
from __gin__ import dynamic_registration
from espalier.model.heads import {module}
from espalier.model import transformer
MODEL = @{module}.{kind}()
{module}.{kind}.backbone = @transformer.Transformer()
"""


def headed_run(trained_run, folder, module, kind, head):
    """A run directory with a checkpoint of the tiny model with a head of one number."""
    snippet = folder / "head.gin"
    snippet.write_text(HEADED.format(module=module, kind=kind))
    files = [f"{trained_run.path}/config.gin", str(snippet)]
    config = gin_config.load(files, [], entry="espalier.launch.train:train")
    run = folder / "run"
    run.mkdir()
    (run / "config.gin").write_text(config.text)
    model_record.write(run)
    run_vocabulary.copy(trained_run.path, run)
    kernel = jnp.linspace(-1, 1, trained_run.model.config.embed_dim)[:, None]
    params = {"backbone": trained_run.params["raw"], head: {"kernel": kernel}}
    with Checkpointer(run / "checkpoints") as checkpointer:
        checkpointer.save(1, {"params": params}, meta=step_dir.read_meta(trained_run.path))
    return run, params


def test_a_reward_model_ranks(command, trained_run, tmp_path, capfd):
    run, params = headed_run(trained_run, tmp_path, "reward_model", "RewardModel", "reward_head")
    given = [*rows(["2", "two"]), *rows(["", "5"], prompt="2 + 3 = ", answer="5")]
    given[0]["ended"] = "length"
    status, best, _ = command(given, "--keep_cut", reward=f"checkpoint:{run}")
    assert status == 0, capfd.readouterr().err
    byte = vocabularies.byte()
    reward = ModelReward(RewardModel(backbone=trained_run.model), params)
    expected = reward(
        [
            Completion(byte.encode(row["prompt"]), byte.encode(row["text"]), row["ended"] == "eos")
            for row in given
        ]
    )
    found = np.ravel([row["rewards"] for row in best])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert len(set(found.tolist())) == 4


class Judged:
    """A reward model over the tokenizer of the golden pairs, whose generation has three end tokens, EOS the last of them."""

    def __init__(self, folder):
        golden = json.loads((GOLDENS / "preference_pairs.json").read_bytes())
        self.ids = golden["tokenizer"]["model"]["vocab"]
        self.cases = {case["name"]: case["row"] for case in golden["cases"]}
        self.ends = [self.ids[token] for token in ("<|eot_id|>", "<|im_end|>", "</s>")]
        for name, content in {
            "tokenizer": golden["tokenizer"],
            "tokenizer_config": golden["tokens"],
            "generation_config": {"eos_token_id": self.ends},
        }.items():
            (folder / f"{name}.json").write_text(json.dumps(content))
        self.vocabulary = vocabularies.huggingface(path=folder)
        sizes = {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "mlp_dim": 24}
        size = self.vocabulary.vocab_size
        config = TransformerConfig(vocab_size=size, scan_layers=False, **sizes)
        self.model = RewardModel(backbone=Transformer(config=config))
        init = jax.jit(lambda: initialise.variables(self.model, jax.random.key(0))["params"])
        params = jax.tree.map(axes.unboxed, init(), is_leaf=lambda x: hasattr(x, "unbox"))
        head = {"kernel": jax.random.normal(jax.random.key(1), (16, 1))}
        self.params = {**params, "reward_head": head}
        self.meta = {"vocabulary": vocabulary_digest(self.vocabulary), "start_token": 0}
        self.folder = folder
        with Checkpointer(folder / "rm" / "checkpoints") as checkpointer:
            checkpointer.save(1, {"params": self.params}, meta=self.meta)

    @functools.cached_property
    def online(self):
        """The reward of runs and of indicators."""
        stored = CheckpointReward(
            model=self.model,
            checkpoint=self.folder / "rm",
            vocabulary=self.vocabulary,
            batch_size=8,
        )
        mesh = partitioning.make_mesh(devices=jax.devices()[:1])
        rules = partitioning.rules_named("fsdp")
        return stored.on(mesh, rules, meta=self.meta, folder=self.folder / "run")

    @functools.cached_property
    def loss(self):
        objective = bradley_terry(model=self.model)
        return jax.jit(lambda params, batch: objective(params, batch, None))

    def batch(self, name, rows, template=None, **settings):
        """The batch of pairs that a reward model is trained on."""
        (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        register_pairs(
            name=name,
            files=str(self.folder / f"{name}.jsonl"),
            vocabulary=self.vocabulary,
            validation_fraction=0,
            chat_template=template,
            cache_dir=self.folder / "cache",
            **settings,
        )
        read = stream.make_stream(
            mixture_or_task_name=name,
            task_feature_lengths={"targets": 256},
            batch_size=len(rows),
            seed=0,
            cache_dir=self.folder / "cache",
            read_last=True,
        )
        return read, jax.tree.map(jnp.asarray, read.batch(0, 0, len(rows)))

    def trained(self, batch):
        """The rewards of a pair in training."""
        metrics = self.loss(self.params, batch).metrics
        return [float(metrics[f"reward/{side}"][0]) for side in ("chosen", "rejected")]

    def loaded(self, template):
        config = RunConfig(
            model=self.model, vocabulary=lambda: self.vocabulary, chat_template=template
        )
        settings = {"meta": self.meta, "row_sharding": None, "row_shards": 1}
        return LoadedRun(config=config, params=self.params, **settings)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    return Judged(tmp_path_factory.mktemp("judged"))


@pytest.mark.parametrize(
    ("case", "template"), [("texts", None), ("chat", "chatml"), ("chat", "llama3")]
)
def test_a_reward_is_read_where_training_reads_it(judged, case, template):
    """Whichever token ended a sample: in a run, by indicators, and in files."""
    row = judged.cases[case]
    path = template and str(GOLDENS / "chat_templates" / f"{template}.jinja")
    _, batch = judged.batch(f"{case}_{template}", [row], path)
    trained = judged.trained(batch)
    assert abs(trained[0] - trained[1]) > 1e-3
    run = judged.loaded(path)
    chat = isinstance(row["prompt"], list)
    texts = [row[side][0]["content"] if chat else row[side] for side in ("chosen", "rejected")]
    prompt = run.tokens({"messages" if chat else "text": row["prompt"]}, "row")
    reader = Texts(judged.vocabulary, judged.ends)
    for end in judged.ends:
        sampled = [[*judged.vocabulary.encode(text), end] for text in texts]
        online = judged.online([reader.completion(prompt, tokens) for tokens in sampled])
        np.testing.assert_allclose(online, trained, atol=1e-5)
    for ended in ("eos", "stop"):
        rows_ = [(text, {"prompt": row["prompt"], "text": text, "ended": ended}) for text in texts]
        np.testing.assert_allclose(best_of_n._by_model(rows_, run, 2), trained, atol=1e-5)
    cut = [(text, {"prompt": row["prompt"], "text": text, "ended": "length"}) for text in texts]
    assert np.all(np.abs(np.array(best_of_n._by_model(cut, run, 2)) - trained) > 1e-3)


def test_a_reward_that_is_no_number_ranks_nothing(judged, monkeypatch):
    """NumPy's largest of several numbers is NaN, if one is."""
    monkeypatch.setattr(ModelReward, "__call__", lambda _, texts: np.full(len(texts), np.nan))
    sample = {"prompt": "a", "text": "b", "ended": "eos"}
    with pytest.raises(ValueError, match="--reward .* not finite"):
        best_of_n._by_model([("row 1", sample)], judged.loaded(None), 1)


def test_commands_say_what_kind_of_model_they_read(trained_run, tmp_path, command, capfd):
    run, _ = headed_run(trained_run, tmp_path, "actor_critic", "ActorCritic", "value_head")
    config = gin_config.load(
        ["t5x_configs/runs/load_run.gin", str(run / "model.json")],
        [],
        entry="espalier.launch.load.load_run:RunConfig",
        unused={"VOCABULARY": "None"},
    ).entry()
    with config.load(str(run)) as loaded:  # the actor is a language model
        assert type(loaded.model).__name__ == "Transformer"
        assert set(loaded.params) == set(trained_run.params["raw"])
    status, *_ = command(rows(["1"]), reward=f"checkpoint:{run}")
    assert status == 2 and "of a ActorCritic: train a reward model" in capfd.readouterr().err


def test_the_bound_holds_and_is_met_by_many_outcomes():
    """Best of n of m equally probable outcomes: outcome k has (k^n - (k - 1)^n) / m^n of it."""
    for n in (1, 2, 8):
        for m, slack in ((2, 1.0), (20_000, 1e-3)):
            k = np.arange(1, m + 1, dtype=np.float64)
            p = (k / m) ** n - ((k - 1) / m) ** n
            p = p[p > 0]
            divergence = float((p * np.log(p * m)).sum())
            assert divergence <= best_of_n.divergence_bound(n) + 1e-9
            assert divergence >= best_of_n.divergence_bound(n) - slack


@pytest.mark.parametrize(
    ("given", "more", "reward", "words"),
    [
        (rows(["1"])[:0], (), "exact_answer", "no samples"),
        ([{**rows(["1"])[0], "sample": 1}], (), "exact_answer", "line 1: expected the samples"),
        ([{"sample": 0, "text": "x"}], (), "exact_answer", "line 1: expected the samples"),
        (rows(["1"]), ("--answer_key=solution",), "exact_answer", "line 1: .*no 'solution'"),
        ([{"sample": 0, "prompt": [1], "tokens": [2]}], (), "exact_answer", "line 1: no 'text'"),
        (rows(["1"]), (), "exact", "--reward=exact must be "),
        ([{**rows(["1"])[0], "ended": "length"}], (), "exact_answer", "All samples .* were cut"),
        (
            rows(["1"]),
            ("--missing_end_penalty=1",),
            "exact_answer",
            "--missing_end_penalty is for samples that were cut: give --keep_cut",
        ),
        (
            rows(["1"]),
            ("--answer_key=k",),
            "reasoning_gym",
            "--answer_key is not read by --reward=",
        ),
        (
            rows(["1"]),
            ("--reward_batch_size=2",),
            "exact_answer",
            "--reward_batch_size is not read",
        ),
        (
            rows(["1"]),
            ("--missing_end_penalty=-1", "--keep_cut"),
            "exact_answer",
            "--missing_end_penalty=-1.0 must be at least 0",
        ),
    ],
)
def test_what_cannot_be_ranked_is_said(command, capfd, given, more, reward, words):
    assert command(given, *more, reward=reward) == (2, None, None)
    assert re.search(words, capfd.readouterr().err)


def test_a_reward_that_is_not_finite_is_refused(command, capfd, monkeypatch):
    monkeypatch.setattr(best_of_n, "_verified", lambda where, row, flags: math.nan)
    assert command(rows(["a", "b"]))[0] == 2
    assert (
        "line 1: --reward=exact_answer gives nan, which cannot be ranked" in capfd.readouterr().err
    )


def test_pairs_need_texts():
    group = [{"prompt": [1], "sample": i, "tokens": [i + 2]} for i in range(2)]
    for i, row in enumerate(group):
        row["text"] = str(i)
    assert best_of_n.pair(group, [0.0, 0.0]) is None
    without = [{"prompt": [1], "sample": i} for i in range(2)]
    for rows_ in ([group[0], without[1]], without):
        with pytest.raises(best_of_n.RewardError, match="'text'"):
            best_of_n.pair(rows_, [0.0, 1.0])
