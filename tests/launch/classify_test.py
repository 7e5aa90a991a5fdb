"""Classifiers of images from gin to evaluation: they learn, go on where they stopped, and say what is wrong."""

import jax
import pytest
from etils import epath

from espalier.launch.config import gin_config
from espalier.launch.precompile import precompile, programs
from espalier.launch.sweep import file
from espalier.model.low_rank import factors
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.telemetry.metric_writers import read_jsonl

EXPERIMENTS = "t5x_configs/experiments/low_rank"
SMALL = (
    "BATCH_SIZE=16",
    "TRAIN_STEPS=12",
    "CHECKPOINT_PERIOD=6",
    "EVAL_PERIOD=6",
    "LOG_PERIOD=2",
    "textures.textures.size=8",
    "IMAGE_SIZE=8",
    "textures.textures.train_images=16",  # few enough to be learned by heart
    "augment.PadCropFlip.padding=0",
    "textures.textures.validation_images=40",
    "resnet.ResNetConfig.stages=(1,)",
    "resnet.ResNetConfig.widths=(16,)",
)


def run(train, path, *bindings, arm="textures_low_rank", status=0):
    given = [f"MODEL_DIR={str(path)!r}", *SMALL, *bindings]
    result = train(
        f"--gin_file={EXPERIMENTS}/cpu/{arm}.gin", *[f"--gin.{binding}" for binding in given]
    )
    assert result.status == status, result.err
    return result


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    return path, run(train, path)


def arrays(path, step):
    return step_dir.read_manifest(epath.Path(path) / "checkpoints" / str(step)).arrays


def values(path):
    """Metrics by step that do not depend on the clock."""
    timed = ("time", "images_per_second", "model_flops_per_second")
    found = {}
    for row in read_jsonl(path / "metrics.jsonl"):
        kept = {k: v for k, v in row.items() if k not in timed and not k.startswith("time/")}
        found.setdefault(row["step"], {}).update(kept)
    return found


def test_a_classifier_in_factors_learns_and_is_evaluated(whole):
    path, result = whole
    found = values(path)
    assert found[12]["loss"] < found[1]["loss"]
    assert found[12]["eval/textures/images"] == 40
    assert 0 <= found[12]["eval/textures/accuracy"] <= 1
    assert "eval/textures/perplexity" not in found[12]
    assert "images     16 a step, 192 in 12 steps" in result.out
    assert any("images_per_second" in row for row in read_jsonl(path / "metrics.jsonl"))
    table = (path / "parameters.txt").read_text()
    assert "stage_0/block_0/conv_0/u" in table and "stem/conv/kernel" in table
    kept = {name for name in arrays(path, 12) if "batch_stats" in name}
    assert any("stage_0/block_0/norm_0" in name for name in kept)


def test_a_run_that_stopped_ends_as_one_that_did_not(train, whole, tmp_path):
    path, _ = whole
    run(train, tmp_path, "TRAIN_STEPS=6", "schedules.stepwise.total_steps=12")
    result = run(train, tmp_path, "schedules.stepwise.total_steps=12")
    assert "step 6 from" in result.out
    assert arrays(tmp_path, 12) == arrays(path, 12)
    assert values(tmp_path)[12] == values(path)[12]


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("resnet.ResNetConfig.num_classes=9", "have 10 classes, but the model 9: set NUM_CLASSES"),
        ("inputs.Images.size=12", "recipe's images are [12, 12, 3], but the training stream's are"),
        (
            "textures.textures.size=9",
            "the image has shape [9, 9, 3], not [8, 8, 3]. Set IMAGE_SIZE",
        ),
        ("images.make_stream.batch_size=8", "bind both to one macro (BATCH_SIZE"),
    ],
)
def test_what_does_not_fit_together_is_one_error_before_the_first_step(
    train, tmp_path, binding, message
):
    result = run(train, tmp_path, binding, status=2)
    assert message in result.err, result.err
    assert not (tmp_path / "metrics.jsonl").exists()


def load(file, *bindings):
    given = ["MODEL_DIR='/tmp/x'", "MESH=None", *bindings]
    return gin_config.load(
        [f"{EXPERIMENTS}/{file}.gin"], given, entry="espalier.launch.train:train"
    )


@pytest.mark.parametrize("scheme", ["spatial", "channel"])
@pytest.mark.parametrize(("name", "layers", "rank"), [("wrn28_10", 27, 0.3), ("resnet50", 52, 0.5)])
def test_at_full_size_all_of_the_blocks_is_factorised(name, layers, rank, scheme):
    config = load(f"full/{name}", f"CONV_SCHEME='{scheme}'")
    program = config.arguments()["recipe"].program()
    found = factors.find_factors(program.abstract_state.params)
    assert len(found) == layers
    assert {one.rank for one in found} == {max(round(rank * min(one.shape)), 1) for one in found}
    dense = {"wrn28_10": 36_536_884, "resnet50": 25_557_032}[name]
    assert program.num_params() == dense - sum(one.dense - one.factors for one in found)
    # Momentum is all the optimiser keeps.
    moments = sum(leaf.size for leaf in jax.tree.leaves(program.abstract_state.opt_state))
    assert moments == pytest.approx(program.num_params(), abs=4)


@pytest.mark.parametrize(("name", "macs"), [("wrn28_10_dense", 5.24e9), ("resnet50_dense", 4.09e9)])
def test_an_images_flops_are_those_of_its_convolutions(name, macs):
    recipe = load(f"full/{name}").arguments()["recipe"]
    assert recipe.program().train_flops_per_unit == pytest.approx(6 * macs, rel=0.002)


def test_a_step_is_compiled_ahead_and_its_flops_are_found():
    recipe = load("cpu/textures_low_rank", *SMALL).arguments()["recipe"]
    program = recipe.program(devices=jax.devices()[:1])
    report, _ = precompile.compile_work(programs.train(program), program, hbm_bytes=1e9)
    assert report.fits and report.flops.analytic == pytest.approx(16 * program.train_flops_per_unit)


def test_the_sweep_has_the_arms_that_are_compared_with_the_dense_one_at_two_rates():
    runs = file.read("launch/papers/low_rank/experiment.py:vision,2")
    kinds = {run.kind for run in runs}
    assert len(runs) == 2 * len(kinds) and {"narrow", "spectral_l2_full"} <= kinds
    two = {f"{start}_frobenius_{rate}" for start in ("he", "spectral") for rate in ("full", "half")}
    assert {"dense", "dense_half", *two} <= kinds and len(kinds) == 8
    assert not any("FACTOR_DECAY='none'" in run.bindings for run in runs)


@pytest.mark.parametrize("decay", ["none", "l2", "frobenius"])
@pytest.mark.parametrize("init", ["he", "spectral", "spectral_ones"])
def test_every_arm_is_a_configuration_without_warnings(init, decay):
    bindings = (f"FACTOR_INIT={init!r}", f"FACTOR_DECAY={decay!r}", "LEARNING_RATE=0.05")
    config = load("cpu/textures_low_rank", *bindings)
    assert [str(warning) for warning in config.warnings] == []
    assert config.arguments()["recipe"].program().num_params() < 77_850
