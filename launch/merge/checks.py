"""Refuses models that compute different functions of their weights, before anything is written."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.data.tokenizers import checkpoint_files, hf_tokenizer
from espalier.launch.merge.models import HfModel, Model, NativeModel
from espalier.launch.merge.settings import Merge, MergeError

# What transformers computes with where config.json lacks a field, by model_type; absent and null differ.
# VARIES: the default differs between versions of transformers.
VARIES: Any = object()

_ALL = {
    "attention_bias": False,
    "mlp_bias": False,
    "use_qk_norm": False,
    "use_sliding_window": False,
    "rope.rope_type": "default",
}
_LLAMA = {
    **_ALL,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope.rope_theta": 10_000.0,
}
_COHERE = {
    **_ALL,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
}
_T5 = {
    "layer_norm_epsilon": 1e-6,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}
_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "cohere": {**_COHERE, "rope.rope_theta": VARIES},
    "cohere2": {**_COHERE, "rope.rope_theta": 10_000.0, "sliding_window": 4096},
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 4096},
    "mixtral": {
        **_LLAMA,
        "rms_norm_eps": 1e-5,
        "rope.rope_theta": 1e6,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": {
        **_ALL,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope.rope_theta": 10_000.0,
        "sliding_window": 4096,
        "query_pre_attn_scalar": VARIES,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gpt2": {
        "tie_word_embeddings": True,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    },
    "t5": {**_T5, "tie_word_embeddings": True, "feed_forward_proj": "relu"},
    "mt5": {**_T5, "tie_word_embeddings": VARIES, "feed_forward_proj": "gated-gelu"},
}
# Fields of config.json that do not change the function that is computed.
_SILENT = {
    *("_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "unk_token_id"),
    *(
        "id2label",
        "label2id",
        "problem_type",
        "auto_map",
        "finetuning_task",
        "task_specific_params",
    ),
    *("initializer_range", "initializer_factor", "output_router_logits", "router_aux_loss_coef"),
    *(
        "attention_dropout",
        "hidden_dropout",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "dropout_rate",
    ),
    *("classifier_dropout", "summary_first_dropout", "pretraining_tp", "max_position_embeddings"),
    *(
        "_attn_implementation",
        "attn_implementation",
        "unsloth_version",
        "unsloth_fixed",
        "max_length",
    ),
    *("gradient_checkpointing", "architectures", "rope_scaling", "rope_parameters", "rope_theta"),
}
_RELATED = 0.1  # least correlation of embeddings of models of one start; others have none
_COMPARED = 1 << 20  # values
_EMBEDDING = re.compile(r"(^|[./])(token_embed|embed_tokens|wte|shared|word_embeddings)([./]|$)")
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "n_layers")
_OF_DEPTH = {*_DEPTHS, "layer_types", "max_window_layers", "no_rope_layers"}


def defaults_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the defaults of the fields of a config.json that are known; of the rotary embedding as `rope.NAME`."""
    return _FAMILIES.get(str(config.get("model_type")), _ALL)


def is_tied(model: Model) -> bool:
    """Returns whether a model's head is the table of the tokens."""
    if not isinstance(model, HfModel):
        return False
    default = defaults_of(model.config).get("tie_word_embeddings")
    return model.config.get("tie_word_embeddings", default) is True


def check(merge: Merge, models: Mapping[str, Model]) -> None:
    """Checks that models of one kind and of one architecture are merged, with one vocabulary unless it is re-indexed.

    Raises:
      MergeError: they differ; the message names the key and both values.
    """
    opened = [models[path] for path in merge.models()]
    first = opened[0]
    for other in opened[1:]:
        if other.kind != first.kind:
            native, hf = sorted([first, other], key=lambda x: x.kind, reverse=True)
            raise MergeError(
                f"{merge.file}: {native.path} is a run, and {hf.path} a Hugging Face folder: convert one of them first, "
                f"espalier convert --from_hf={hf.path} --to=DIR."
            )
        deep = any(source.layers for part in merge.slices() for source in part.sources)
        if isinstance(other, NativeModel) and isinstance(first, NativeModel):
            _check_native(merge, first, other, deep=deep)
        elif isinstance(other, HfModel) and isinstance(first, HfModel):
            _check_config(merge, first, other, deep=deep)
    if merge.tokens is None and isinstance(first, HfModel):
        _check_tokenizers(merge, [x for x in opened if isinstance(x, HfModel)])
    for key, value in (("tokenizer", merge.tokens), ("chat_template", merge.chat_template)):
        if value is not None and isinstance(first, NativeModel):
            raise MergeError(
                f"{merge.file}: {key}: vocabularies and templates of runs are not changed: export the models with "
                "launch.convert --to_hf, merge them there, and import the result."
            )


def warn(merge: Merge, models: Mapping[str, Model]) -> None:
    """Warns of models whose merge is hardly of use; layers of any models may be stacked."""
    if merge.method != "passthrough" and merge.tokens is None:
        _warn_unrelated(merge, models)
        _warn_factors(merge, models)


def _warn_unrelated(merge: Merge, models: Mapping[str, Model]) -> None:
    """Warns of models whose embeddings are not correlated: weights of models of other starts do not correspond."""
    opened = [models[path] for path in merge.models()]
    names = [next(filter(_EMBEDDING.search, x.tensors), None) for x in opened]
    first = _some_values(opened[0], names[0])
    for model, name in zip(opened[1:], names[1:], strict=True):
        values = _some_values(model, name)
        if first is None or values is None or values.size != first.size or not first.size:
            continue
        with np.errstate(invalid="ignore", divide="ignore"):
            correlation = float(np.corrcoef(first, values)[0, 1])
        if abs(correlation) < _RELATED:
            print(
                f"warning: the embeddings of {opened[0].path} and {model.path} have a correlation of {correlation:.2f}, as "
                "models of different starts do: their mean is hardly of use.",
                file=sys.stderr,
            )


def _warn_factors(merge: Merge, models: Mapping[str, Model]) -> None:
    """Warns of matrices stored as factors: the product of the merged factors is not the merge of the products."""
    from espalier.model.low_rank.decompose import factorised_modules

    model = models[merge.models()[0]]
    if isinstance(model, NativeModel) and (
        modules := factorised_modules(model.source.abstract.shapes)
    ):
        print(
            f"warning: {len(modules)} matrices, such as {modules[0]}, are stored as factors U and V, which are merged apart: "
            "their product is not the merge of the matrices. For that, make the models dense first: "
            "espalier upcycle factorise --recompose.",
            file=sys.stderr,
        )


def _some_values(model: Model, name: str | None) -> np.ndarray | None:
    if name is None:
        return None
    size = int(np.prod(model.tensors[name].shape))
    return model.read(name)(0, min(size, _COMPARED)).astype(np.float64)


def facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config.json that decide the computed function, the rotary embedding's in one spelling."""
    result = {key: value for key, value in config.items() if key not in _SILENT}
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(config.get(key), dict):
            rope |= config[key]
    rope.setdefault("rope_type", rope.pop("type", "default"))
    if config.get("rope_theta") is not None:
        rope.setdefault("rope_theta", config["rope_theta"])
    return result | {f"rope.{key}": value for key, value in rope.items() if value is not None}


def _check_config(merge: Merge, first: HfModel, other: HfModel, *, deep: bool) -> None:
    here, there = facts(first.config), facts(other.config)
    defaults = defaults_of(first.config)
    ignored = {*(_OF_DEPTH if deep else ()), *(("vocab_size",) if merge.tokens else ())}
    unknown = []
    for key in sorted({*here, *there} - ignored):
        name = key.removeprefix("rope.")
        lacking = other if key in here else first
        if (key in here) != (key in there) and key not in defaults:
            unknown.append(f"{name} ({lacking.path})")
            continue
        a, b = (side.get(key, defaults.get(key)) for side in (here, there))
        if VARIES in (a, b):
            raise MergeError(
                f"{merge.file}: {lacking.path}/config.json has no {name}, whose default differs between versions of "
                "transformers: add the value that the model was trained with."
            )
        if not _same(a, b):
            remedy = (
                "add `tokenizer_source: union` to align vocabularies"
                if key == "vocab_size"
                else "models that compute differently cannot be merged; if one config.json is wrong, correct it"
            )
            raise MergeError(
                f"{merge.file}: {name} is {_shown(a, key in here)} in {first.path}/config.json, and "
                f"{_shown(b, key in there)} in {other.path}/config.json: {remedy}."
            )
    if unknown:
        print(
            f"warning: fields that one config.json lacks, and whose default is not known, were not compared: "
            f"{', '.join(unknown)}.",
            file=sys.stderr,
        )


def _shown(value: Any, written: bool) -> str:
    return f"{value!r}{'' if written else ' (by default)'}"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, int | float) and isinstance(b, int | float):
        return float(a) == float(b)
    return bool(a == b)


def _check_native(merge: Merge, first: NativeModel, other: NativeModel, *, deep: bool) -> None:
    from espalier.model.hf.description import describe, differences

    here, there = describe(first.model), describe(other.model)
    if deep:
        for side in (here, there):
            for key in ("config.num_layers", "layers"):
                side.pop(key, None)
    if words := differences(here, there):
        raise MergeError(
            f"{merge.file}: {first.path} and {other.path} are not of one model: {'; '.join(words[:5])}. Models that compute "
            "differently cannot be merged."
        )
    if first.source.meta.get("vocabulary") != other.source.meta.get("vocabulary"):
        raise MergeError(
            f"{merge.file}: {other.path} was trained with another vocabulary than {first.path}, in which the same ids "
            "are other words: merge models of one vocabulary."
        )


def tokenizer_of(folder: str | os.PathLike) -> bytes | None:
    """Returns a folder's tokenizer.json; None if it has none."""
    limit = checkpoint_files.MAX_BYTES
    return checkpoint_files.read(folder, hf_tokenizer.TOKENIZER, max_bytes=limit)


def _check_tokenizers(merge: Merge, models: Sequence[HfModel]) -> None:
    """Raises MergeError if the models have tokenizers with different ids.

    Raises:
      TokenizerError: a file is damaged or not safe to read.
    """
    texts = {model: tokenizer_of(model.folder) for model in models}
    known = [(model, text) for model, text in texts.items() if text is not None]
    for model, text in known[1:]:
        first, own = known[0]
        if text == own:
            continue
        ids, theirs = (hf_tokenizer.load(x).get_vocab(with_added_tokens=True) for x in (own, text))
        if ids != theirs:
            token = min(x for x in {*ids, *theirs} if ids.get(x) != theirs.get(x))
            raise MergeError(
                f"{merge.file}: the tokenizers of {first.path} and {model.path} differ: {token!r} has the id "
                f"{ids.get(token, 'none')} in the first and {theirs.get(token, 'none')} in the second. Add "
                "`tokenizer_source: union` (or base) to align vocabularies."
            )
