"""Reads one document of a merge's configuration strictly: unknown keys and parameters are errors with the nearest name."""

import contextlib
import math
import pathlib
import re
import reprlib
from collections.abc import Sequence
from typing import Any

from espalier.common import spelling
from espalier.common.storage import paths
from espalier.launch.merge.settings import (
    DTYPES,
    Condition,
    Merge,
    MergeError,
    Module,
    Parameters,
    Slice,
    Source,
    Tokens,
    TokenSource,
)
from espalier.model.transforms import patterns
from espalier.model.transforms.merge_methods import METHODS, Method


class Document:
    """Reads one document; messages begin with the file and the key."""

    def __init__(self, path: str, index: int, count: int):
        self._file = path
        self._where = path if count == 1 else f"{path}, document {index + 1}"
        self._method: Method | None = None
        self._method_name = ""

    def error(self, key: str, problem: str) -> MergeError:
        return MergeError(f"{self._where}: {key + ': ' if key else ''}{problem}")

    def merge(self, value: Any) -> Merge:
        keys = (
            *("name", "merge_method", "base_model", "models", "slices", "modules", "parameters"),
            *("dtype", "out_dtype", "tokenizer", "tokenizer_source", "chat_template"),
        )
        fields = self.mapping("", value, keys)
        if "merge_method" not in fields:
            raise self.error("merge_method", f"is missing: give one of {', '.join(METHODS)}.")
        self._method_name = name = self.text("merge_method", fields["merge_method"])
        if name not in METHODS:
            hint = spelling.nearest(name, METHODS)
            raise self.error("merge_method", f"there is no method {name!r}; {hint}")
        self._method = METHODS[name]
        forms = [key for key in ("models", "slices", "modules") if fields.get(key) is not None]
        if len(forms) != 1:
            shown = " and ".join(forms) or "none"
            raise self.error("", f"give exactly one of models, slices and modules, not {shown}.")
        if forms == ["modules"]:
            entries = self.mapping("modules", fields["modules"], None)
            modules = {key: self.module(f"modules.{key}", entries[key]) for key in entries}
        else:
            modules = {"": self.module("", {forms[0]: fields[forms[0]]})}
        return Merge(
            file=self._where,
            name=self.name(fields.get("name")),
            method=name,
            base=self.model("base_model", fields.get("base_model")),
            modules=modules,
            parameters=self.parameters("parameters", fields.get("parameters")),
            dtype=self.dtype("dtype", fields.get("dtype")),
            out_dtype=self.dtype("out_dtype", fields.get("out_dtype")),
            tokens=self.tokens(fields.get("tokenizer"), fields.get("tokenizer_source")),
            chat_template=self.text("chat_template", fields.get("chat_template"), needed=False),
            text=value,
        )

    def mapping(self, key: str, value: Any, known: Sequence[str] | None) -> dict[str, Any]:
        if not isinstance(value, dict) or not all(isinstance(x, str) for x in value):
            raise self.error(key, "must be a mapping of names to values.")
        for name in value:
            if known is not None and name not in known:
                hint = spelling.nearest(name, known)
                raise self.error(f"{key}.{name}" if key else name, f"is not a known key; {hint}")
        return value

    def listed(self, key: str, value: Any) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise self.error(key, "must be a list with at least one entry.")
        return value

    def text(self, key: str, value: Any, *, needed: bool = True) -> Any:
        if value is None and not needed:
            return None
        if not isinstance(value, str) or not value or "\0" in value:
            raise self.error(key, f"must be a text, not {reprlib.repr(value)}.")
        return value

    def name(self, value: Any) -> str | None:
        name = self.text("name", value, needed=False)
        if name is not None and (not re.fullmatch(r"[\w.+-]{1,100}", name) or name.startswith(".")):
            raise self.error("name", f"{name!r} must be a plain name of letters, digits, - and _.")
        return name

    def dtype(self, key: str, value: Any) -> str | None:
        name = self.text(key, value, needed=False)
        if name is not None and name not in DTYPES:
            raise self.error(key, f"{name!r} is not supported; {spelling.nearest(name, DTYPES)}")
        return name

    def model(self, key: str, value: Any) -> str | None:
        if isinstance(value, dict):
            fields = self.mapping(key, value, ("model", "path", "lora", "revision"))
            if fields.get("lora") is not None or fields.get("revision") is not None:
                value = f"{fields.get('path')}{'+' if fields.get('lora') else '@'}"
            else:
                value = fields.get("path", fields.get("model"))
                return self.model(key, value)
        path = self.text(key, value, needed=False)
        if path is None or paths.is_remote(path):
            return path
        if not pathlib.Path(path).exists() and re.search(r"[@+]", path):
            raise self.error(
                key,
                f"{path!r}: a revision (@) or a LoRA (+) is not read: download the revision to a folder, or merge the LoRA "
                "first (espalier convert --from_peft, espalier upcycle merge), and give that folder.",
            )
        return path

    def module(self, key: str, value: Any) -> Module:
        fields = self.mapping(key, value, ("slices", "models", "parameters"))
        prefix = f"{key}." if key else ""
        if (fields.get("slices") is None) == (fields.get("models") is None):
            raise self.error(key, "give either slices or models.")
        parameters = self.parameters(f"{prefix}parameters", fields.get("parameters"))
        if fields.get("models") is not None:
            entries = enumerate(self.listed(f"{prefix}models", fields["models"]))
            sources = [self.source(f"{prefix}models[{i}]", x, layers=False) for i, x in entries]
            return Module(
                (self.checked(f"{prefix}models", Slice(tuple(sources), None, {})),), parameters
            )
        slices = []
        for i, entry in enumerate(self.listed(f"{prefix}slices", fields["slices"])):
            slices.append(self.slice(f"{prefix}slices[{i}]", entry))
        return Module(tuple(slices), parameters)

    def slice(self, key: str, value: Any) -> Slice:
        fields = self.mapping(
            key, value, ("sources", "base_model", "parameters", "residual_weight")
        )
        if fields.get("residual_weight") is not None:
            raise self.error(f"{key}.residual_weight", "is not supported: remove it.")
        entries = enumerate(self.listed(f"{key}.sources", fields.get("sources")))
        sources = [self.source(f"{key}.sources[{i}]", x, layers=True) for i, x in entries]
        counts = {source.layers[1] - source.layers[0] for source in sources if source.layers}
        if len(counts) > 1:
            raise self.error(f"{key}.sources", f"have {sorted(counts)} layers: give equal ranges.")
        parameters = self.parameters(f"{key}.parameters", fields.get("parameters"))
        base = self.model(f"{key}.base_model", fields.get("base_model"))
        return self.checked(key, Slice(tuple(sources), base, parameters))

    def checked(self, key: str, part: Slice) -> Slice:
        names = [source.model for source in part.sources]
        if len({(source.model, source.layers) for source in part.sources}) < len(names):
            raise self.error(key, "lists a model twice: remove one, or change its weight.")
        return part

    def source(self, key: str, value: Any, *, layers: bool) -> Source:
        known = ("model", "parameters", *(("layer_range",) if layers else ()))
        fields = self.mapping(key, value, known)
        path = self.model(f"{key}.model", fields.get("model"))
        if path is None:
            raise self.error(f"{key}.model", "is missing: give the path of a checkpoint.")
        bounds = None
        if layers:
            bounds = fields.get("layer_range")
            right = isinstance(bounds, list) and len(bounds) == 2
            if (
                not right
                or not all(type(x) is int for x in bounds)
                or not 0 <= bounds[0] < bounds[1]
            ):
                raise self.error(
                    f"{key}.layer_range", "must be [first, end] with 0 <= first < end."
                )
            bounds = (bounds[0], bounds[1])
        own = self.parameters(f"{key}.parameters", fields.get("parameters"), of_model=True)
        return Source(path, bounds, own)

    def parameters(self, key: str, value: Any, *, of_model: bool = False) -> Parameters:
        assert self._method is not None  # the method is read first
        if value is None:
            return {}
        known = self._method.parameters
        result = {}
        for name, setting in self.mapping(key, value, None).items():
            if name not in known:
                raise self.error(
                    f"{key}.{name}",
                    f"{self._method_name} has no parameter {name!r}; {spelling.nearest(name, known)}",
                )
            if of_model and not known[name].each:
                raise self.error(
                    f"{key}.{name}",
                    "is one value for all models: move it to the merge's parameters.",
                )
            if setting is not None:
                result[name] = self.conditions(f"{key}.{name}", setting, name)
        return result

    def conditions(self, key: str, value: Any, name: str) -> tuple[Condition, ...]:
        if isinstance(value, dict):
            value = [value]
        if not (isinstance(value, list) and value and all(isinstance(x, dict) for x in value)):
            return (Condition(self.setting(key, value, name)),)
        result = []
        for i, entry in enumerate(value):
            where = f"{key}[{i}]"
            fields = self.mapping(where, entry, ("filter", "pattern", "value", "non_layer"))
            if "value" not in fields:
                raise self.error(where, "has no value: add `value:`.")
            text = self.text(f"{where}.filter", fields.get("filter"), needed=False)
            pattern = self.pattern(f"{where}.pattern", fields.get("pattern"))
            if text is not None and pattern is not None:
                raise self.error(where, "give either filter or pattern.")
            outside = fields.get("non_layer")
            if outside is not None:
                outside = self.number(f"{where}.non_layer", outside, name)
            value_ = self.setting(f"{where}.value", fields["value"], name)
            result.append(Condition(value_, text, pattern, outside))
        return tuple(result)

    def pattern(self, key: str, value: Any) -> Any:
        text = self.text(key, value, needed=False)
        try:
            return None if text is None else patterns.compiled(text)
        except patterns.PatternError as error:
            raise self.error(key, f"{error}.") from None

    def setting(self, key: str, value: Any, name: str) -> Any:
        if isinstance(value, list):
            return [
                self.number(f"{key}[{i}]", x, name) for i, x in enumerate(self.listed(key, value))
            ]
        return self.number(key, value, name)

    def number(self, key: str, value: Any, name: str) -> Any:
        """Returns a checked value; YAML reads numbers such as 1e-4 as texts."""
        assert self._method is not None
        parameter = self._method.parameters[name]
        if isinstance(value, str) and parameter.kind is not bool:
            with contextlib.suppress(ValueError):
                value = float(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise self.error(key, f"must be a finite number, not {value!r}.")
        if problem := parameter.check(value):
            raise self.error(key, f"must be {problem}, not {reprlib.repr(value)}.")
        return value

    def tokens(self, block: Any, source: Any) -> Tokens | None:
        if block is not None and source is not None:
            raise self.error("tokenizer", "give either tokenizer or tokenizer_source.")
        if block is None:
            source = self.model("tokenizer_source", source)
            return None if source is None else Tokens(source)
        fields = self.mapping("tokenizer", block, ("source", "tokens", "pad_to_multiple_of"))
        multiple = fields.get("pad_to_multiple_of")
        if multiple is not None and (type(multiple) is not int or not 1 <= multiple <= 1 << 20):
            raise self.error("tokenizer.pad_to_multiple_of", "must be a positive whole number.")
        entries = self.mapping("tokenizer.tokens", fields.get("tokens") or {}, None)
        tokens = {
            name: self.token(f"tokenizer.tokens.{name}", entry) for name, entry in entries.items()
        }
        source = self.model("tokenizer.source", fields.get("source", "union"))
        return Tokens(str(source), tokens, multiple)

    def token(self, key: str, value: Any) -> TokenSource:
        fields = self.mapping(key, value, ("source", "force"))
        force, source = fields.get("force", False), fields.get("source")
        if not isinstance(force, bool):
            raise self.error(f"{key}.force", "must be true or false.")
        if source is None or isinstance(source, str):
            return TokenSource(model=self.model(f"{key}.source", source), force=force)
        inner = self.mapping(f"{key}.source", source, ("kind", "model", "token", "token_id"))
        if inner.get("kind") == "zero":
            return TokenSource(zero=True, force=force)
        tokens = [inner[x] for x in ("token", "token_id") if inner.get(x) is not None]
        if inner.get("kind") != "model_token" or len(tokens) != 1:
            raise self.error(
                f"{key}.source",
                "must be a model, {kind: zero}, or {kind: model_token, model, token or token_id}.",
            )
        model = self.model(f"{key}.source.model", inner.get("model"))
        if model is None or not isinstance(tokens[0], str | int) or isinstance(tokens[0], bool):
            raise self.error(f"{key}.source", "needs a model, and the text or the id of a token.")
        return TokenSource(model=model, token=tokens[0], force=force)
