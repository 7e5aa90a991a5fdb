"""An encoder-decoder tuned on files of inputs with targets: adapters side by side, preferences and rewards, and the harness."""

import json

import numpy as np
import pytest
from etils import epath

from espalier.launch.load.load_run import LoadError
from espalier.model.adapters.adapter import is_adapter
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.telemetry.metric_writers import read_jsonl

SMALL = (
    "config.TransformerConfig.num_layers=1",
    "config.TransformerConfig.embed_dim=16",
    "config.TransformerConfig.num_heads=2",
    "config.TransformerConfig.head_dim=4",
    "config.TransformerConfig.mlp_dim=16",
    "config.TransformerConfig.vocab_size=280",
    "VOCABULARY=@vocabularies.byte()",
    "vocabularies.byte.extra_ids=20",
    "BATCH_SIZE=8",
    "LOG_PERIOD=1",
    "WARMUP_STEPS=0",
)
WITH_DATA = (
    "TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 16}",
    "EVAL_PERIOD=2",
    "EVAL_STEPS=1",
)
TUNING = ("models/t5_tiny", "data/examples_base", "runs/pretrain")
ONLINE = ("models/t5_tiny", "data/prompts_base", "runs/online")
PREFERENCES = ("models/t5_tiny", "data/preferences_base", "runs/preference")
VOCABULARY = """
from __gin__ import dynamic_registration
from espalier.data.tokenizers import vocabularies
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    sums = [(f"{a} + {b} =", str(a + b), "none") for a in range(6) for b in range(6)]
    (folder / "examples.jsonl").write_text(
        "".join(json.dumps({"inputs": q, "targets": a}) + "\n" for q, a, _ in sums)
    )
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": q, "chosen": a, "rejected": b}) + "\n" for q, a, b in sums)
    )
    (folder / "vocabulary.gin").write_text(VOCABULARY)
    return folder


@pytest.fixture(scope="module")
def start(train, files):
    """Trains with gin files; returns the result of `train`."""

    def call(path, names, *bindings, steps=2, status=0):
        given = (
            f"MODEL_DIR={str(path)!r}",
            f"EXAMPLES={str(files / 'examples.jsonl')!r}" if names[:3] == TUNING else "",
            "EXAMPLES_VALIDATION_FRACTION=0.2" if names[:3] == TUNING else "",
            "MIXTURE_OR_TASK_NAME='examples'" if names[:3] == TUNING else "",
            f"PAIRS={str(files / 'pairs.jsonl')!r}" if names[:3] == PREFERENCES else "",
            "PAIRS_VALIDATION_FRACTION=0.2" if names[:3] == PREFERENCES else "",
            *(() if names[:3] == ONLINE else WITH_DATA),
            f"TRAIN_STEPS={steps}",
            *SMALL,
            *bindings,
        )
        result = train(
            f"--gin_file={files / 'vocabulary.gin'}",
            *(f"--gin_file=t5x_configs/{name}.gin" for name in names),
            *(f"--gin.{binding}" for binding in given if binding),
        )
        assert result.status == status, result.err
        return result

    return call


@pytest.fixture(scope="module")
def base(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "base"
    result = start(folder, TUNING, "CHECKPOINT_PERIOD=1", "LEARNING_RATE=1e-2")
    assert "examples" in result.out
    return folder


def metric(path, name):
    return [row[name] for row in read_jsonl(f"{path}/metrics.jsonl") if name in row]


@pytest.fixture(scope="module")
def adapters(start, base):
    """LoRA of two seeds, and (IA)3."""
    paths = []
    for name, method, more in (
        ("one", "lora", "SEED=1"),
        ("two", "lora", "SEED=2"),
        ("three", "ia3", "SEED=1"),
    ):
        path = base.parent / name
        names = (*TUNING, f"methods/adapters/{method}")
        more = (more, f"INITIAL_CHECKPOINT_PATH={str(base)!r}", "LEARNING_RATE=3e-2")
        start(path, names, *more, *(["LORA_RANK=2"] if method == "lora" else []))
        paths.append(str(path))
    return paths


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_of_examples_is_learnt_and_held_out(base, command, tmp_path):
    first, last = metric(base, "loss")
    assert np.isfinite([first, last]).all()
    facts = json.loads((base / "run.json").read_text())["tasks"]["examples"]
    assert facts["documents"] == {"train": 29, "validation": 7}
    flags = [f"--checkpoint={base}", "--trust_config", f"--json={tmp_path / 'x.json'}"]
    assert command("evaluate loss", *flags) == 0
    loss = json.loads((tmp_path / "x.json").read_text())["tasks"]["examples"]["loss"]
    assert loss == pytest.approx(metric(base, "eval/examples/loss")[-1], abs=1e-4)


def test_adapters_side_by_side_are_each_alone(base, adapters, command, tmp_path, monkeypatch):
    from espalier.launch.inference import generate, score

    source, made = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
    rows = [{"inputs": f"{i} + 1 =", "targets": str(i + 1)} for i in range(3)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    programs = []
    for module, name in ((score, "Scorer"), (generate, "Decoder")):
        kind = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, kind=kind, **k: programs.append(kind) or kind(*a, **k)
        )
    many = [f"--adapter={path}" for path in adapters]
    for name, more in (
        ("score", []),
        ("generate", ["--max_new_tokens=4", "--temperature=0"]),
        ("score", ["--weights_dtype=int8"]),  # of the base; adapters stay as they are
    ):
        flags = [f"--inputs={source}", f"--output={made}", *more]
        programs.clear()
        assert command(name, f"--checkpoint={base}", *many, *flags) == 0
        assert len(programs) == 2  # one for both seeds of LoRA, and one for (IA)3
        together = rows_of(made)
        assert [row["adapter"] for row in together] == [x for x in adapters for _ in rows]
        for i, path in enumerate(adapters):
            assert command(name, f"--checkpoint={path}", *flags) == 0
            for row, alone in zip(together[3 * i : 3 * i + 3], rows_of(made), strict=True):
                np.testing.assert_allclose(row["logprobs"], alone["logprobs"], atol=1e-5)
    assert together[0]["logprobs"] != together[3]["logprobs"]


def test_shards_of_rows_have_the_scores_of_all_adapters(
    base, adapters, command, tmp_path, in_shards
):
    source = tmp_path / "x.jsonl"
    rows = [{"inputs": f"{i} + {'9' * i} =", "targets": str(i + 1)} for i in range(20)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--checkpoint={base}", *(f"--adapter={path}" for path in adapters)]
    flags += [f"--inputs={source}", "--batch_size=8"]
    flag, begun = in_shards
    for name, more in (("one", []), ("shards", [flag])):
        assert command("score", *flags, f"--output={tmp_path / name}", *more) == 0
    assert begun == [1, 0]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "shards").read_bytes()


def test_adapters_of_another_base_are_refused(base, adapters, command, capsys, tmp_path):
    source = tmp_path / "x.jsonl"
    source.write_text('{"inputs": "a", "targets": "b"}\n')
    files = [f"--inputs={source}", f"--output={tmp_path / 'y.jsonl'}"]
    one = adapters[0]
    for flags, words in (
        ([f"--checkpoint={base}/checkpoints/1", f"--adapter={one}"], "of another base model than"),
        ([f"--checkpoint={one}", f"--adapter={one}"], "has adapters itself"),
        ([f"--checkpoint={base}", f"--adapter={base}"], "is of a model without adapters"),
    ):
        assert command("score", *flags, *files) == 2
        assert words in capsys.readouterr().err


def test_virtual_tokens_of_the_inputs_are_learnt(start, base, tmp_path):
    more = ("PROMPT_LENGTH=2", "PROMPT_FIRST_ID=270")
    more += (f"INITIAL_CHECKPOINT_PATH={str(base)!r}", "LEARNING_RATE=1e-2")
    result = start(tmp_path / "run", (*TUNING, "methods/adapters/prompt"), *more)
    assert "adapter prompt: Prompt at 1 layer, 32 parameters" in result.out
    saved = [step_dir.read_manifest(epath.Path(p)).arrays for p in step_dir.candidates(base)[:1]]
    ours = step_dir.read_manifest(step_dir.resolve(tmp_path / "run")).arrays
    changed = {
        name
        for name, entry in ours.items()
        if name.startswith("params/")
        and (name not in saved[0] or entry.digest != saved[0][name].digest)
    }
    assert {name for name in changed if not is_adapter(name.removeprefix("params/"))} == set()
    assert changed == {"params/token_embed/adapter_prompt/change"}


def test_virtual_tokens_come_before_all_inputs_of_an_encoder(start, base, command, tmp_path):
    from espalier.launch.evaluate.seqio_tasks import EncoderAnswers
    from espalier.launch.lm_eval.model import EspalierLM
    from espalier.launch.load import load_run
    from espalier.trainers.scoring.scoring import Row, Scorer

    more = ("PROMPT_LENGTH=2", "PROMPT_FIRST_ID=270", "LEARNING_RATE=1.0")
    more += (f"INITIAL_CHECKPOINT_PATH={str(base)!r}",)
    tuned = tmp_path / "run"
    start(tuned, (*TUNING, "methods/adapters/prompt"), *more)
    text, targets = "1 + 2 =", [50, 51]
    with load_run.config_of(str(tuned)).load(str(tuned), encoder_decoders=True) as run:
        inputs = [*run.vocabulary.encode(text), run.vocabulary.eos_id]
        scorer = Scorer(run.model, run.params, batch_size=2)
        plain, wanted = (
            float(log_probs.sum())
            for log_probs in scorer(
                [
                    Row(context=[0], targets=targets, encoder_inputs=[*prefix, *inputs])
                    for prefix in ([], [270, 271])
                ]
            )
        )
        assert abs(plain - wanted) > 1e-2
        example = {"inputs": inputs, "targets": targets}
        assert EncoderAnswers(run, 1).scores([example]) == pytest.approx([wanted], abs=1e-4)
    source, made = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
    rows = [{"inputs": text, "targets": targets}, {"tokens": inputs, "targets": targets}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [f"--inputs={source}", f"--output={made}"]
    assert command("score", f"--checkpoint={base}", f"--adapter={tuned}", *files) == 0
    assert [row["sum"] for row in rows_of(made)] == pytest.approx([wanted] * 2, abs=1e-4)
    model = EspalierLM(checkpoint=str(tuned))
    try:
        asked = [(("", ""), inputs, targets)]
        ((log_prob, _),) = model._loglikelihood_tokens(asked)
        assert log_prob == pytest.approx(wanted, abs=1e-4)
    finally:
        model.close()


def test_pairs_do_not_tune_a_prompt(start, base, tmp_path):
    names = (*PREFERENCES, "methods/adapters/prompt")
    more = ("PROMPT_FIRST_ID=260", f"INITIAL_CHECKPOINT_PATH={str(base)!r}", "PROMPT_EOS=True")
    refused = start(tmp_path / "run", names, *more, status=2)
    assert "begin with virtual tokens, and those of PackedPairs do not" in refused.err


def test_preferences_are_learnt_against_the_base(start, base, tmp_path):
    more = (f"INITIAL_CHECKPOINT_PATH={str(base)!r}", "PROMPT_EOS=True")
    stored = tmp_path / "stored"
    start(stored, PREFERENCES, *more, "LEARNING_RATE=1e-3", steps=3)
    assert metric(stored, "loss")[0] == pytest.approx(np.log(2), abs=1e-5)
    assert metric(stored, "loss")[-1] < np.log(2)
    packed = tmp_path / "packed"
    more = (*more, "LORA_RANK=2", "PACKING='best_fit'", "LEARNING_RATE=1e-2")
    lora = (*PREFERENCES, "methods/adapters/lora", "methods/adapters/own_base")
    start(packed, lora, *more, "TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 16}", steps=3)
    assert metric(packed, "loss")[0] == pytest.approx(np.log(2), abs=1e-5)
    assert metric(packed, "loss")[-1] < np.log(2)
    more = more[:2]
    refused = start(
        tmp_path / "refused", PREFERENCES, *more, "TASK_FEATURE_LENGTHS={'targets': 32}", status=2
    )
    assert "reads inputs, and PackedPairs has none" in refused.err
    assert "set TASK_FEATURE_LENGTHS = {'inputs': 512, 'targets': 512}" in refused.err


def test_it_learns_from_its_own_samples_and_a_reward_model(start, base, files, tmp_path):
    """GRPO with updates on each rollout goes on bit for bit; PPO has a critic, and the policy's rewards are those of the file."""
    own = (f"INITIAL_CHECKPOINT_PATH={str(base)!r}", "BACKBONE=@encoder_decoder.EncoderDecoder()")
    reward = tmp_path / "reward"
    names = (*PREFERENCES, "methods/preference/reward_model")
    start(reward, names, *own, "INITIAL_STRICT=False", "PROMPT_EOS=True", "LEARNING_RATE=1e-2")
    assert metric(reward, "loss")[0] == pytest.approx(np.log(2), abs=1e-5)
    online = (
        *("MAX_PROMPT_LENGTH=12", "MAX_NEW_TOKENS=4", "PROMPTS=8", "SAMPLES=2", "UPDATES=2"),
        "BATCH_SIZE=16",
        f"PROMPT_FILES={str(files / 'pairs.jsonl')!r}",
        "tasks.register_prompts.prompt_eos=True",
        "CHECKPOINT_PERIOD=1",
        "LEARNING_RATE=1e-3",
    )
    grpo = (*ONLINE, "methods/preference/grpo", "methods/preference/reward_checkpoint")
    given = (*own, *online, f"REWARD_CHECKPOINT={str(reward)!r}", "WITH_REFERENCE=True", "BETA=0.1")
    run = tmp_path / "grpo"
    start(run, grpo, *given, steps=4)
    whole = {row["step"]: row for row in read_jsonl(run / "metrics.jsonl")}
    assert whole[1]["reward"] == whole[2]["reward"] != whole[3]["reward"]
    assert whole[1]["kl"] == pytest.approx(0, abs=1e-5) and abs(whole[1]["ratio"] - 1) < 1e-4
    steps = epath.Path(run) / "checkpoints"
    ended = step_dir.read_manifest(steps / "4").arrays
    (steps / "4").rmtree()  # the run goes on in the middle of its second rollout
    start(run, grpo, *given, steps=4)
    assert step_dir.read_manifest(steps / "4").arrays == ended

    ppo = (*ONLINE, "methods/preference/ppo")
    online += ("VERIFIERS=[@verifiers.too_long]", "verifiers.too_long.free=0")
    online += ("verifiers.too_long.span=4",)
    start(tmp_path / "ppo", ppo, *own, *online, steps=1)
    assert np.isfinite(metric(tmp_path / "ppo", "value_loss")).all()
    refused = start(tmp_path / "no", ppo, own[0], *online, status=2)
    assert "encoder_decoder.EncoderDecoder" in refused.err


def test_it_learns_a_teacher_that_runs_or_is_stored(start, base, tmp_path):
    given = (f"TEACHER={str(base)!r}", "TEMPERATURE=2.0", "SEED=3")
    live, stored = tmp_path / "live", tmp_path / "stored"
    start(live, (*TUNING, "methods/distillation/distillation"), *given)
    more = (f"TEACHER_STORE={str(tmp_path / 'store')!r}", "TEACHER_TOP_K=280")
    start(stored, (*TUNING, "methods/distillation/distillation_stored"), *given, *more)
    for name in ("loss", "divergence", "distillation_loss"):
        np.testing.assert_allclose(metric(stored, name), metric(live, name), rtol=2e-4)


def test_routers_read_the_sentences_that_another_model_embeds(
    start, base, files, command, tmp_path
):
    from espalier.launch.load import load_run

    embedded, made = tmp_path / "embedded.jsonl", tmp_path / "y.jsonl"
    given = [f"--checkpoint={base}", f"--inputs={files / 'examples.jsonl'}"]
    assert command("prepare embed_sentences", *given, f"--output={embedded}") == 0
    rows = rows_of(embedded)
    with load_run.config_of(str(base)).load(str(base), encoder_decoders=True) as run:
        ids = [*run.vocabulary.encode(rows[3]["inputs"]), run.vocabulary.eos_id]
        inputs = np.array([ids] * 8)  # a row for each device
        states = run.model.apply({"params": run.params}, inputs, method="encode").states_BSD
    mean = np.asarray(states, np.float64)[0].mean(0)
    mean /= np.sqrt((mean**2).mean() + 1e-6)
    np.testing.assert_allclose(rows[3]["sentence_embedding"], mean, atol=1e-4)

    tuned = tmp_path / "run"
    more = (f"EXAMPLES={str(embedded)!r}", "examples.register_examples.with_sentences=True")
    more += ("ADAPTER_ROUTER_INPUT='sentence'", "ADAPTER_EXPERTS=2", "LEARNING_RATE=0.3")
    more += ("mov.Mov.sentence_dim=16", f"INITIAL_CHECKPOINT_PATH={str(base)!r}")
    start(tuned, (*TUNING, "methods/mov/mov"), *more)
    assert np.isfinite(metric(tuned, "eval/examples/loss")).all()
    some = tmp_path / "x.jsonl"
    other = {"sentence_embedding": [-10 * x for x in rows[3]["sentence_embedding"]]}
    some.write_text("".join(json.dumps({**rows[3], **more}) + "\n" for more in ({}, other)))
    flags = [f"--checkpoint={tuned}", f"--inputs={some}", f"--output={made}"]
    assert command("score", *flags) == 0
    one, two = (row["sum"] for row in rows_of(made))
    assert one != two
    assert command("generate", *flags, "--max_new_tokens=3") == 0
    assert len(rows_of(made)) == 2


def test_the_harness_scores_and_continues_it(base, command, tmp_path):
    from lm_eval.api.instance import Instance

    from espalier.launch.lm_eval.model import EspalierLM

    source, made = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
    rows = [{"inputs": "1 + 2 =", "targets": " 3"}, {"inputs": "a longer context", "targets": "x"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [f"--inputs={source}", f"--output={made}"]
    assert command("score", f"--checkpoint={base}", *files) == 0
    sums = [row["sum"] for row in rows_of(made)]
    assert command("generate", f"--checkpoint={base}", "--max_new_tokens=3", *files) == 0
    texts = [row["text"] for row in rows_of(made)]
    model = EspalierLM(checkpoint=str(base))
    try:

        def asked(kind, *arguments):
            return [
                Instance(request_type=kind, doc={}, arguments=x, idx=i)
                for i, x in enumerate(arguments)
            ]

        # The harness moves the space at a context's end to the continuation.
        pairs = asked("loglikelihood", ("1 + 2 = ", "3"), ("a longer context", "x"))
        assert [x for x, _ in model.loglikelihood(pairs)] == pytest.approx(sums, abs=1e-4)
        kwargs = {"until": [], "max_gen_toks": 3}
        wanted = asked("generate_until", *((row["inputs"], kwargs) for row in rows))
        assert model.generate_until(wanted) == texts
        with pytest.raises(LoadError, match="an encoder-decoder predicts targets of inputs"):
            model.loglikelihood_rolling(asked("loglikelihood_rolling", ("a",)))
    finally:
        model.close()
