"""Every gin file parses, binds only what exists, and the models it describes have the published size."""

import pathlib
import re

import jax
import pytest

from espalier.launch.config import gin_config
from espalier.model import axes
from espalier.trainers import initialise, partitioning
from espalier.trainers.inputs import PackedTokens
from espalier.trainers.optim.gradient_terms import ParamAxes
from espalier.trainers.trainable import path_name

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = ROOT / "t5x_configs"
FILES = sorted(str(path.relative_to(ROOT)) for path in CONFIGS.rglob("*.gin"))
PARTITIONING = sorted(path.stem for path in (CONFIGS / "partitioning").glob("*.gin"))
# Those of full size ask for data, and have tests of their own (tests/{code_mix,low_rank}_recipes_test.py).
EXPERIMENTS = [
    name
    for name in FILES
    if "/experiments/" in name and "/full/" not in name and "_base" not in name
]
# corpus_base.gin is a part of bytes.gin and corpus.gin.
DATA = sorted(path.stem for path in (CONFIGS / "data").glob("*.gin") if "base" not in path.stem)
ABSTRACT = {
    "base",
    "cohere_base",
    "encoder_decoder_base",
    "wide_resnet_base",
}  # which others include
MODELS = sorted({path.stem for path in (CONFIGS / "models").glob("*.gin")} - ABSTRACT)
# Those of images, and what goes with them in a run; all others are of text.
IMAGES = {"cifar100", "digits", "imagenet", "textures"}
# Those of pairs, which tests/launch/preference/preference_pairs_test.py reads.
PAIRS = {"preferences"}
CHATS = {"aya23", "chat", "instructions_decoder", "safety"}  # which runs/finetune.gin learns
PROMPTS = {"prompts"}  # which runs/online.gin continues
SYMBOLS = {"topic_symbols"}  # a vocabulary alone, for pairs and prompts
# Methods of runs/online.gin and of runs/preference.gin, which is DPO without any.
ONLINE = {"online_dpo", "rloo", "grpo", "gspo", "cispo", "ppo"}
PREFERENCE = {
    "dpo_nll",
    "ipo",
    "slic",
    "simpo",
    "cpo",
    "orpo",
    "kto",
    "ld_dpo",
    "wpo",
    "tr_dpo",
    "reward_model",
    "indicators",
}
ENCODER_DECODERS = {name for name in MODELS if re.match("m?t5_", name)}
CLASSIFIERS = {"cnn_tiny": "textures", "resnet50": "imagenet", "wrn28_10": "cifar100"}


def t5_count(vocabulary, layers, width, heads, mlp, *, matrices=3, tables=2, head_dim=64):
    """Of an encoder-decoder: tables, layers of the encoder and of the decoder, final norms, and position biases."""
    attention = 4 * width * heads * head_dim
    encoder = attention + matrices * width * mlp + 2 * width
    decoder = encoder + attention + width
    return tables * vocabulary * width + layers * (encoder + decoder) + 2 * width + 2 * 32 * heads


T5_SIZES = {
    "small": (8, 512, 6, 1024),
    "base": (12, 768, 12, 2048),
    "large": (24, 1024, 16, 2816),
    "xl": (24, 2048, 32, 5120),
    "xxl": (24, 4096, 64, 10240),
}

# Exact counts: closed forms of the shapes, and the published ones where those are exact (GPT-2, Llama,
# BAM's seed and BTX over it, SmolLM2 and 3, Aya 23, Mistral, Mixtral, Qwen, Gemma, OLMo, Pythia, Apertus).
COUNTS = {
    "tiny": 384 * 64 + 2 * (2 * 64**2 + 2 * 64 * 32 + 3 * 64 * 192 + 64) + 64,
    "cohere2_tiny": 512 * 64 + 2 * (2 * 64**2 + 2 * 64 * 32 + 3 * 64 * 192 + 64) + 64,
    "quickstart": 4096 * 128 + 3 * (4 * 128**2 + 3 * 128 * 512 + 128) + 128,
    "bench_llama": 8192 * 256 + 6 * (4 * 256**2 + 3 * 256 * 704 + 512) + 256,
    "bench_blocks": 512 * 1024 + 2 * (4 * 1024**2 + 3 * 1024 * 4096 + 2048) + 1024,
    "code_mix_470m": 256_000 * 1024 + 16 * (4 * 1024**2 + 3 * 1024 * 2816 + 1024) + 1024,
    "code_mix_2p8b": 256_000 * 2560 + 27 * (4 * 2560**2 + 3 * 2560 * 6912 + 2560) + 2560,
    "bam_590m": 587_209_728,
    "bam_4x590m": 776_002_560,
    "btx_590m": 700_480_512,
    "bam_2b": 1_991_000_000,
    "nexus_2p8b": 256_000 * 2560 + 26 * (4 * 2560**2 + 3 * 2560 * 7424 + 2560) + 2560,
    # Experts and a shared one, the router's projection, and the experts' embeddings, which are data.
    "nexus_6x470m": 256_000 * 1024
    + 16 * (4 * 1024**2 + (6 + 1) * 3 * 1024 * 2816 + 3 * 1024**2 + 6 * 1024 + 1024)
    + 1024,
    "nexus_4x2p8b": 256_000 * 2560
    + 26 * (4 * 2560**2 + (4 + 1) * 3 * 2560 * 7424 + (2 * 1024 + 2560) * 2560 + 4 * 1024 + 2560)
    + 2560,
    "aya23_8b": 8_028_033_024,
    "aya23_35b": 34_980_831_232,
    "command_r_35b": 34_980_831_232,
    "aya_expanse_8b": 8_028_033_024,
    "aya_expanse_32b": 256_000 * 8192
    + 40 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 24_576 + 8192)
    + 8192,
    "command_r7b": 8_028_033_024,
    "mistral_7b": 7_241_732_096,
    "mixtral_8x7b": 46_702_792_704,
    "qwen2p5_0p5b": 494_032_768,
    "qwen3_0p6b": 596_049_920,
    "gemma2_2b": 2_614_341_888,
    "gpt2": 124_439_808,
    "olmo2_7b": 7_298_617_344,
    "olmo3_7b": 7_298_617_344,
    "smollm3_3b": 3_075_098_624,
    "pythia_160m": 162_322_944,
    "pythia_410m": 405_334_016,
    "pythia_1p4b": 1_414_647_808,
    "pythia_6p9b": 6_857_302_016,
    # Two of xIELU's four numbers of a layer are data.
    "apertus_8b": 8_053_338_176 + 2 * 32,
    "gemma3_1b": 999_885_952,
    "qwen3_30b_a3b": 30_532_122_624,
    # One dense layer and 48 of experts; 32 layers of experts, with the width of four more for every token.
    "north_mini_30b_a3b": 262_144 * 2048
    + 49 * (2 * 2048 * (4096 + 512) + 2048)
    + 3 * 2048 * 3072
    + 48 * (128 * 3 * 2048 * 768 + 2048 * 128)
    + 2048,
    "command_a_plus_218b": 262_144 * 4096
    + 32 * (2 * 4096 * (16_384 + 1024) + (128 + 4) * 3 * 4096**2 + 4096 * 128 + 4096)
    + 4096,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "smollm_135m": 134_515_008,
    **{f"t5_1_1_{size}": t5_count(32_128, *sizes) for size, sizes in T5_SIZES.items()},
    **{f"mt5_{size}": t5_count(250_112, *sizes) for size, sizes in T5_SIZES.items()},
    "t5_1_0_base": t5_count(32_128, 12, 768, 12, 3072, matrices=2, tables=1),
    "t5_tiny": t5_count(384, 2, 64, 4, 128, head_dim=16),
    "cnn_tiny": 9 * 3 * 16
    + (16 + 16) * (9 * 16 + 2)
    + sum(2 * i + 9 * i * o + 2 * o + 9 * o * o + i * o for i, o in ((16, 32), (32, 64)))
    + 2 * 64
    + 65 * 10,
    "wrn28_10": 36_536_884,
    "resnet50": 25_557_032,
}
# Published to a few digits only.
ROUNDED = {"bam_2b": 1e6}


@pytest.mark.smoke
@pytest.mark.parametrize("file", FILES)
def test_file_has_no_problems(file):
    assert [str(problem) for problem in gin_config.check([file], fragment=True).problems] == []


def load(*files, data=("TASKS=()",), bindings=()):
    """A pre-training run of these files."""
    given = ("MODEL_DIR='/tmp/x'", "MIXTURE_OR_TASK_NAME='x'", *data, *bindings)
    paths = [f"t5x_configs/{name}.gin" for name in files]
    return gin_config.load(paths, given, entry="espalier.launch.train:train")


def load_recipe(name, methods=()):
    if name in CLASSIFIERS:
        files = (f"models/{name}", f"data/{CLASSIFIERS[name]}", "runs/classify", *methods)
        config = gin_config.load(
            [f"t5x_configs/{file}.gin" for file in files],
            ["MODEL_DIR='/tmp/x'"],
            entry="espalier.launch.train:train",
        )
    else:
        lengths = ["TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 8}"]
        bindings = lengths if name in ENCODER_DECODERS else []
        config = load(f"models/{name}", "runs/pretrain", *methods, bindings=bindings)
    return config.arguments()["recipe"]


@pytest.mark.parametrize("name", MODELS)
def test_model_initialises_abstractly_with_its_size(name):
    recipe = load_recipe(name)
    params = initialise.abstract_variables(recipe.model, recipe.inputs_spec)["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == pytest.approx(COUNTS[name], abs=ROUNDED.get(name, 0), rel=0)
    check_decay(params)


def check_decay(boxed):
    """The rule over logical axes gives the masks and stacks of a rule over names."""
    param_axes = ParamAxes.of(boxed)
    decayed = {path: param_axes.decayed(path) for path in param_axes.names}
    by_name = {path: not re.fullmatch(r"(.*/)?(scale|bias|alpha_.)", path) for path in decayed}
    data = {path for path, names in param_axes.names.items() if axes.CONSTANT in names}
    assert {path for path in decayed if decayed[path] != by_name[path]} <= data
    # One layer's parameter has two dimensions, or one; adafactor maps over the others.
    for path, names in param_axes.names.items():
        kernels = r"(.*/)?layers/(.*/)?(kernel|embedding|u|v)"
        rank = 2 if re.fullmatch(kernels, path) else 1 if "layers/" in path else len(names)
        if path not in data:
            assert len(names) - param_axes.stack_rank(path) == rank, (path, names)


@pytest.mark.parametrize("name", ["tiny", "gpt2", "nexus_6x470m", "cnn_tiny"])
def test_factors_are_decayed_as_kernels_are(name):
    method = "low_rank_conv" if name in CLASSIFIERS else "low_rank"
    recipe = load_recipe(name, [f"methods/low_rank/{method}"])
    check_decay(initialise.abstract_variables(recipe.model, recipe.inputs_spec)["params"])


def test_every_model_has_a_count():
    assert set(MODELS) == set(COUNTS)
    published = {"small": 77.0e6, "base": 247.6e6, "large": 783.2e6, "xl": 2.850e9, "xxl": 11.135e9}
    for size, count in published.items():
        assert COUNTS[f"t5_1_1_{size}"] == pytest.approx(count, rel=7e-4)
    assert COUNTS["t5_1_0_base"] == 222_903_552  # as transformers counts t5-base


@pytest.mark.parametrize(
    ("name", "bindings", "total", "active"),
    [
        ("bam_590m", [], 587_209_728, 587_209_728),
        ("btx_590m", [], 700_480_512, 587_234_304),
        ("btx_590m", ["EXPERTS=5"], 738_235_392, None),
        ("btx_590m", ["EXPERTS=6"], 775_990_272, None),
        ("btx_590m", ["EXPERTS=6", "TOP_K=3"], 775_990_272, 587_246_592 + 2 * 37_748_736),
        ("btx_590m", ["EXPERTS=7"], 813_745_152, None),
        ("btx_590m", ["EXPERTS=8"], 851_500_032, None),
        # Printed as 662,731,776, which counts one of the two routers.
        ("bam_4x590m", [], 776_002_560, 662_756_352),
        # Printed as 612,400,128, without the keys and values that experts share.
        ("bam_4x590m", ["SHARED_KV=True"], 738_253_824, 625_007_616),
        ("nexus_6x470m", [], 1_348_584_448, 606_192_640),
        ("nexus_4x2p8b", [], 9_055_940_096, 4_302_118_400),
    ],
)
def test_parameters_of_the_mixtures_papers(name, bindings, total, active):
    """BAM's table (arXiv 2408.08274), and Nexus' 1.3B of which 605M are active, 9.1B and 4.3B (arXiv 2408.15901)."""
    model = load(f"models/{name}", "runs/pretrain", bindings=bindings).arguments()["recipe"].model
    params = initialise.abstract_variables(model)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == total
    if active is None:
        return
    # A token meets those of the products, norms, and where it is not the head, the table of tokens.
    config = model.config
    of_one_key = (
        2
        * config.num_layers
        * model.layer_settings()[0].attention.query_heads
        * config.per_head_dim
    )
    met = model.forward_flops(PackedTokens(1).arrays(1)) / 2 - of_one_key
    met += (config.num_layers + 1) * config.embed_dim
    met += 0 if model.tie_embeddings else config.vocab_size * config.embed_dim
    assert met == active


@pytest.mark.parametrize("arm", ["text", "balanced", "code_then_text"])
def test_arms_of_the_quickstart_share_everything_but_their_phases(arm):
    def bindings(name):
        file = f"t5x_configs/experiments/code_mix/quickstart_{name}.gin"
        text = gin_config.load(
            [file], ["MODEL_DIR='/tmp/x'"], entry="espalier.launch.train:train"
        ).text
        return {line for line in text.splitlines() if "phases" not in line and "'" not in line}

    assert bindings(arm) == bindings("text")


# The mesh of each partitioning file that fits the tiny model's two key/value heads on eight devices,
# and what its rule set makes of parameters and of the residual stream.
DP, FSDP, TP = {"data": 8}, {"fsdp": 8}, {"data": 4, "tensor": 2}
BOTH = {"fsdp": 4, "tensor": 2}
ROWS, ALL_ROWS = ("data", "fsdp"), ("data", "fsdp", "expert")
EP, CP = {"fsdp": 2, "expert": 4}, {"fsdp": 2, "context": 4}
PARTS = ("fsdp", "context")
SPLITS = {
    #             mesh, query kernel, MLP's down kernel, embedding, residual stream
    "dp": (DP, (None, None, None), (None, None, None), (None, None), (ROWS, None)),
    "fsdp": (FSDP, (None, "fsdp", None), (None, None, "fsdp"), (None, "fsdp"), (ROWS, None)),
    "tp": (TP, (None, None, "tensor"), (None, "tensor", None), ("tensor", None), (ROWS, None)),
    "fsdp_tp": (
        BOTH,
        (None, "fsdp", "tensor"),
        (None, "tensor", "fsdp"),
        ("tensor", "fsdp"),
        (ROWS, None),
    ),
    "fsdp_tp_sp": (
        BOTH,
        (None, "fsdp", "tensor"),
        (None, "tensor", "fsdp"),
        ("tensor", "fsdp"),
        (ROWS, "tensor"),
    ),
    "ep": ({"expert": 8}, (None, None, None), (None, None, None), (None, None), (ALL_ROWS, None)),
    "fsdp_ep": (EP, (None, "fsdp", None), (None, None, "fsdp"), (None, "fsdp"), (ALL_ROWS, None)),
    "fsdp_cp": (CP, (None, PARTS, None), (None, None, PARTS), (None, PARTS), (ROWS, "context")),
}
# A device has a part of one row at a time.
ROW_BY_ROW = {"fsdp_cp": ["recipe.Recipe.microbatches=32"]}


def test_every_partitioning_file_has_its_splits():
    assert set(PARTITIONING) == set(SPLITS)


@pytest.mark.parametrize("name", PARTITIONING)
def test_a_partitioning_file_splits_what_its_rule_set_says(name):
    mesh, query, down, embedding, residual = SPLITS[name]
    files = ("models/tiny", "runs/pretrain", f"partitioning/{name}")
    config = load(*files, bindings=[f"MESH={mesh}", *ROW_BY_ROW.get(name, ())])
    assert [str(warning) for warning in config.warnings] == []
    recipe = config.arguments()["recipe"]
    program = recipe.program()
    assert recipe.rules == name
    assert {axis: size for axis, size in program.mesh.shape.items() if size > 1} == mesh
    state = program.abstract_state
    specs = {
        path_name(path): tuple(leaf.sharding.spec)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
    }
    assert specs["layers/block_0/attention/query/kernel"] == query
    assert specs["layers/block_0/mlp/down/kernel"] == down
    assert specs["token_embed/embedding"] == embedding
    assert specs["final_norm/scale"] == (None,)
    assert tuple(program.batch_sharding.spec) == residual[:1]
    names = (axes.BATCH, axes.LENGTH)
    assert tuple(partitioning.mesh_spec(names, program.rules)) == residual


@pytest.mark.parametrize("name", PARTITIONING)
def test_a_partitioning_file_as_it_is_fits_a_model_of_usual_size(name):
    written = {"dp": DP, "fsdp": FSDP, "tp": {"tensor": 8}, "ep": {"expert": 8}}
    written |= {"fsdp_ep": EP, "fsdp_cp": CP}
    written = written.get(name, {"fsdp": 2, "tensor": 4})
    files = ("models/llama3_8b", "runs/pretrain", f"partitioning/{name}")
    config = load(*files, bindings=ROW_BY_ROW.get(name, ()))
    program = config.arguments()["recipe"].program()
    assert {axis: size for axis, size in program.mesh.shape.items() if size > 1} == written


# What a data file requires to be set.
FOLDERS = ["DATA_ROOT='data'", "TOKENIZER='tokenizer'"]
REQUIRED = {
    "bam_full": [*FOLDERS, "SHARES={'law': 1.0}"],
    "nexus_full": [*FOLDERS, "SHARES={'arxiv': 1.0}"],
    "code_mix_full": [*FOLDERS, "MBPP='m'", "SHARES={'text': 1.0}"],
    "examples": ["EXAMPLES='pairs/*.jsonl'", "TOKENIZER='my_run/tokenizer'"],
    "files": ["FILES='my_data/*.jsonl'"],
    "instructions": ["TOKENIZER='t'", "INSTRUCTIONS_DIR='d'", "TRAIN_SETS={'a': ['b']}"],
    "t0": ["TOKENIZER='t'", "INSTRUCTIONS_DIR='d'"],
    "hf_files": ["FILES='my_data/*.jsonl'", "TOKENIZER='my_run/tokenizer'"],
    "mixtures": ["MIXTURES_MODULE='my_tasks'"],
    "tfds": ["TFDS_NAME='my_set:1.0.0'"],
}


@pytest.mark.parametrize("name", sorted(set(DATA) - IMAGES - PAIRS - CHATS - PROMPTS - SYMBOLS))
def test_a_data_file_makes_a_run_with_nothing_left_to_set_or_unused(name):
    files = ("models/tiny", f"data/{name}", "runs/pretrain")
    config = load(*files, data=REQUIRED.get(name, ()))
    assert [str(warning) for warning in config.warnings] == []
    arguments = config.arguments()
    assert len(arguments["tasks"]) == 1 and all(map(callable, arguments["tasks"]))
    assert callable(arguments["stream"]) and callable(arguments["eval_stream"])


@pytest.mark.parametrize("denoising", ["SpanCorruption", "PrefixLM"])
def test_texts_make_a_run_of_an_encoder_decoder_with_nothing_left_to_set_or_unused(denoising):
    bindings = [f"DENOISING=@noise.{denoising}()", "vocabularies.byte.extra_ids=100"]
    config = load("models/t5_tiny", "data/bytes", "runs/denoise", data=(), bindings=bindings)
    assert [str(warning) for warning in config.warnings] == []
    recipe = config.arguments()["recipe"]
    shapes = {name: array.shape for name, array in recipe.inputs_spec.arrays(2).items()}
    assert shapes["encoder_input_tokens"] == (2, 512)
    assert shapes["decoder_target_tokens"] == (2, 114)
    assert recipe.length == 512 + 114


def test_an_encoder_decoder_asks_for_the_length_of_its_inputs():
    with pytest.raises(ValueError, match="lacks 'inputs', which an encoder-decoder reads"):
        load("models/t5_tiny", "runs/pretrain").arguments()


@pytest.mark.parametrize("name", sorted(IMAGES))
def test_a_file_of_images_makes_a_run_with_nothing_left_to_set_or_unused(name):
    files = ("models/cnn_tiny", f"data/{name}", "runs/classify")
    config = gin_config.load(
        [f"t5x_configs/{file}.gin" for file in files],
        ["MODEL_DIR='/tmp/x'"],
        entry="espalier.launch.train:train",
    )
    assert [str(warning) for warning in config.warnings] == []
    arguments = config.arguments()
    recipe = arguments["recipe"]
    assert callable(arguments["stream"]) and callable(arguments["eval_stream"])
    assert recipe.inputs_spec.arrays(2)["images"].shape == (
        2,
        *recipe.inputs_spec.init_arguments()[0].shape[1:],
    )


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_what_a_data_file_requires_is_asked_for(name):
    macros = [binding.partition("=")[0] for binding in REQUIRED[name]]
    with pytest.raises(gin_config.ConfigError) as raised:
        load("models/tiny", f"data/{name}", "runs/pretrain", data=())
    assert len(raised.value.problems) == len(macros)
    assert all(f"'{macro}' is required" in str(raised.value) for macro in macros)


# What an arm of a sweep has beside an experiment's file, such as launch/papers/preference/experiment.py; batches of which eight
# devices have equal parts.
_PAIRS = ["PAIRS='x.jsonl'", "PAIRS_VALIDATION='y.jsonl'", "INITIAL_CHECKPOINT_PATH='/tmp/sft'"]
_BASE = ["t5x_configs/models/tiny.gin", "t5x_configs/experiments/aya_expanse/vocabulary_base.gin"]
_STAGES = "t5x_configs/experiments/aya_expanse/"
_SMALL = f"{_STAGES}cpu/model_base.gin"
_FROM_BASE = ["BASE='/tmp/base'", "INITIAL_CHECKPOINT_PATH='/tmp/base'"]
ARMS = {
    "t5x_configs/experiments/aya_expanse/sft.gin": (_BASE, ["CHATS='x.jsonl'", *_FROM_BASE]),
    "t5x_configs/experiments/aya_expanse/polish.gin": (_BASE, ["CHATS='x.jsonl'", *_FROM_BASE]),
    "t5x_configs/experiments/aya_expanse/preference.gin": (_BASE, ["PAIRS='x.jsonl'", *_FROM_BASE]),
    "t5x_configs/experiments/aya_expanse/online.gin": (
        _BASE,
        ["PROMPT_FILES='x.jsonl'", *_FROM_BASE],
    ),
    "t5x_configs/experiments/aya_expanse/cpu/sft.gin": (
        [_SMALL, f"{_STAGES}sft.gin", *_BASE[1:], f"{_STAGES}cpu/sft.gin"],
        ["CHATS='x.jsonl'", *_FROM_BASE],
    ),
    "t5x_configs/experiments/aya_expanse/cpu/preference.gin": (
        [_SMALL, f"{_STAGES}preference.gin", *_BASE[1:], f"{_STAGES}cpu/preference.gin"],
        ["PAIRS='x.jsonl'", "TRAIN_STEPS=100", *_FROM_BASE],
    ),
    "t5x_configs/experiments/aya_expanse/cpu/online.gin": (
        [_SMALL, f"{_STAGES}online.gin", *_BASE[1:], f"{_STAGES}cpu/online.gin"],
        ["PROMPT_FILES='x.jsonl'", "TRAIN_STEPS=100", *_FROM_BASE],
    ),
    "t5x_configs/experiments/mov/cpu/operations.gin": (
        [],
        ["TOKENIZER='/tmp/t5/vocabulary.model'", "INSTRUCTIONS_DIR='/tmp/rows'"],
    ),
    "t5x_configs/experiments/influence/cpu/corpus.gin": (
        [],
        ["FILES='x.jsonl'", "VALIDATION_FILES='y.jsonl'"],
    ),
    "t5x_configs/experiments/preference/cpu/preference.gin": ([], _PAIRS),
    "t5x_configs/experiments/preference/cpu/online.gin": (
        ["t5x_configs/methods/preference/rloo.gin"],
        _PAIRS,
    ),
    "t5x_configs/experiments/aya23/cpu/instruct.gin": (
        [],
        ["INITIAL_CHECKPOINT_PATH='/tmp/base'"],
    ),
    "t5x_configs/experiments/preference/smollm/arithmetic.gin": (
        [],
        [
            "PAIRS='x.jsonl'",
            "TOKENIZER='/tmp/sft/tokenizer'",
            "INITIAL_CHECKPOINT_PATH='/tmp/sft'",
            "BATCH_SIZE=8",
        ],
    ),
}


@pytest.mark.parametrize("file", EXPERIMENTS)
def test_an_experiment_makes_a_program(file):
    files, bindings = ARMS.get(file, ([], []))
    bindings = ["MODEL_DIR='/tmp/x'", *bindings]
    config = gin_config.load([file, *files], bindings, entry="espalier.launch.train:train")
    arguments = config.arguments()
    program = arguments["recipe"].program()
    assert program.num_params() > 0
    assert program.mesh.devices.size == jax.device_count()
    assert (arguments["total_steps"] or arguments["total_tokens"]) > 0
    assert arguments.get("tasks") or arguments["recipe"].inputs_spec.unit == "images"


@pytest.mark.parametrize(
    ("data", "bindings"),
    [
        ("chat", ["CHATS='x.jsonl'"]),
        ("aya23", ["INSTRUCTIONS_DIR='d'"]),
        ("aya23 safety", ["INSTRUCTIONS_DIR='d'", "SAFETY_WEIGHT=0.02"]),
        ("instructions_decoder", ["INSTRUCTIONS_DIR='d'", "TRAIN_SETS={'a': ['b']}"]),
    ],
)
def test_conversations_make_a_run_with_nothing_left_to_set_or_unused(data, bindings):
    names = ("models/tiny", *(f"data/{name}" for name in data.split()), "runs/finetune")
    config = gin_config.load(
        [f"t5x_configs/{name}.gin" for name in names],
        [
            "MODEL_DIR='/tmp/x'",
            "INITIAL_CHECKPOINT_PATH='/tmp/y'",
            "TOKENIZER='t'",
            *bindings,
        ],
        entry="espalier.launch.train:train",
    )
    assert [str(warning) for warning in config.warnings] == []
    arguments = config.arguments()
    assert arguments["total_epochs"] == 3 and arguments["total_steps"] is None
    assert arguments["recipe"].length == 1024


@pytest.mark.parametrize("name", sorted(ONLINE))
@pytest.mark.parametrize("judged", ["text", "model"])
def test_a_method_makes_an_online_run_with_nothing_left_to_set_or_unused(name, judged):
    files = ["models/tiny", "data/prompts", "runs/online", f"methods/preference/{name}"]
    bindings = [
        "MODEL_DIR='/tmp/x'",
        "INITIAL_CHECKPOINT_PATH='/tmp/sft'",
        "PROMPT_FILES='x.jsonl'",
        "TOKENIZER='/tmp/sft/tokenizer'",
        "TRAIN_STEPS=10",
    ]
    if judged == "model":
        files.append("methods/preference/reward_checkpoint")
        bindings.append("REWARD_CHECKPOINT='/tmp/rm'")
    paths = [f"t5x_configs/{file}.gin" for file in files]
    config = gin_config.load(paths, bindings, entry="espalier.launch.train:train")
    assert [str(warning) for warning in config.warnings] == []
    recipe = config.arguments()["recipe"]
    assert recipe.batch_size == 32 * recipe.inputs_spec.rows_per_prompt
    batch = recipe.inputs_spec.arrays(recipe.batch_size)
    assert batch["decoder_input_tokens"].shape == (recipe.batch_size, recipe.length)
    boxed = initialise.abstract_variables(recipe.model, recipe.inputs_spec)["params"]
    assert ("value_head" in boxed) == (name == "ppo")


def load_preferences(methods=(), bindings=()):
    """A run of preferences with these methods."""
    given = [
        "MODEL_DIR='/tmp/x'",
        "INITIAL_CHECKPOINT_PATH='/tmp/sft'",
        "PAIRS='x.jsonl'",
        "TOKENIZER='/tmp/sft/tokenizer'",
        "TRAIN_STEPS=10",
    ]
    names = ("models/tiny", "data/preferences", "runs/preference")
    files = [
        f"t5x_configs/{name}.gin"
        for name in (*names, *(f"methods/preference/{m}" for m in methods))
    ]
    return gin_config.load(files, [*given, *bindings], entry="espalier.launch.train:train")


@pytest.mark.parametrize(
    "methods",
    [
        (),
        ("reference_free",),
        ("reference_live",),
        *((name,) for name in sorted(PREFERENCE)),
        ("indicators", "simpo"),
        ("simpo", "indicators"),
        ("indicators", "reference_live"),
        ("kto", "reference_live"),
    ],
)
def test_a_method_makes_a_run_of_preferences_with_nothing_left_to_set_or_unused(methods):
    config = load_preferences(methods)
    assert [str(warning) for warning in config.warnings] == []
    recipe = config.arguments()["recipe"]
    free = {
        "reference_free",
        "reference_live",
        "ld_dpo",
        "tr_dpo",
        "simpo",
        "cpo",
        "orpo",
        "reward_model",
    } & {*methods}
    assert ("reference_log_probs" in recipe.inputs_spec.arrays(32)) == (not free)


@pytest.mark.parametrize("name", ["distillation", "distillation_stored"])
def test_distillation_needs_a_teacher_alone(name):
    files = ["models/tiny", "data/bytes", "runs/pretrain", f"methods/distillation/{name}"]
    given = ["MODEL_DIR='/tmp/x'", "MIXTURE_OR_TASK_NAME='text'", "TEACHER='/tmp/teacher'"]
    config = gin_config.load(
        [f"t5x_configs/{file}.gin" for file in files], given, entry="espalier.launch.train:train"
    )
    assert [str(warning) for warning in config.warnings] == []
    batch = config.arguments()["recipe"].inputs_spec.arrays(8)
    stored = name == "distillation_stored"
    assert ("teacher_ids" in batch) == ("teacher_log_probs" in batch) == stored


def test_every_method_of_preferences_is_known():
    """A file that says which run it comes after is in one of the lists above."""
    after = {"preference": set(), "online": set()}
    for path in (CONFIGS / "methods").rglob("*.gin"):
        for run, found in after.items():
            found |= {path.stem} if f"runs/{run}.gin" in path.read_text() else set()
    assert after["preference"] == PREFERENCE | {
        "reference_free",
        "reference_live",
        "reference_run",
        "own_base",
    }
    assert after["online"] == ONLINE | {
        "reward_checkpoint",
        "reference_run",
        "own_base_online",
        "on_policy_pool",
    }


@pytest.mark.parametrize(
    "bindings",
    [
        ["LOSSES=[@direct.dpo, @terms.nll]", "LOSS_WEIGHTS=[1.0, 0.1]"],
        ["direct.dpo.divergence=@divergence.js"],
        ["LOSSES=[@direct.hinge]", "direct.hinge.beta=0.2"],
        ["LOSSES=[@transport.aot]"],
        ["LOSSES=[@absolute.nca_pair]"],
    ],
)
def test_losses_are_named_on_the_command_line(bindings):
    config = load_preferences(bindings=bindings)
    assert [str(warning) for warning in config.warnings] == []
    assert callable(config.arguments()["recipe"].objective)
