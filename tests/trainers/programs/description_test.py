"""What a traced function reads has one digest, and every change of it another."""

import dataclasses
import enum
import functools
import io
import threading
import types

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from espalier.model.config import TransformerConfig
from espalier.model.transformer import Transformer
from espalier.trainers.programs import sources
from espalier.trainers.programs.description import Undescribable, digest


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass(frozen=True)
class Settings:
    rate: float = 0.1
    names: tuple[str, ...] = ("a",)


class Plain:
    def __init__(self, value):
        self.value = value


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


def closing_over(value):
    def inner(x, y=2):
        return x, y, value

    return inner


def with_default(value):
    def inner(x, y=value):
        return x, y

    return inner


def model(**changes):
    sizes = {"vocab_size": 16, "num_layers": 1, "embed_dim": 8, "num_heads": 2, "mlp_dim": 8}
    return Transformer(config=TransformerConfig(**sizes | changes))


def adamw(rate, decay=0.1):
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.linear_schedule(rate, 0.0, 10), weight_decay=decay),
    )


# Pairs of functions that make a value, and the same with one change.
CHANGES = {
    "a number": (lambda: 1, lambda: 2),
    "its type": (lambda: 1, lambda: 1.0),
    "a boolean": (lambda: 1, lambda: True),
    "an order": (lambda: (1, 2), lambda: (2, 1)),
    "a container": (lambda: (1, 2), lambda: [1, 2]),
    "nesting": (lambda: ((1,), 2), lambda: ((1, 2),)),
    "a key": (lambda: {"a": 1}, lambda: {"b": 1}),
    "a set": (lambda: {"a", "b"}, lambda: {"a", "c"}),
    "an enum": (lambda: Colour.RED, lambda: Colour.BLUE),
    "a field": (lambda: Settings(), lambda: Settings(rate=0.2)),
    "an attribute": (lambda: Plain([1]), lambda: Plain([2])),
    "a slot": (lambda: Slotted(1), lambda: Slotted(2)),
    "a closure": (lambda: closing_over(1), lambda: closing_over(2)),
    "a deep closure": (lambda: closing_over([Plain(1)]), lambda: closing_over([Plain(2)])),
    "a default": (lambda: with_default(1), lambda: with_default(2)),
    "a partial argument": (
        lambda: functools.partial(max, 1),
        lambda: functools.partial(max, 2),
    ),
    "a bound object": (lambda: [1].count, lambda: [2].count),
    "an array": (lambda: np.arange(3), lambda: np.array([0, 1, 3])),
    "a dtype of an array": (
        lambda: np.arange(3, dtype=np.int32),
        lambda: np.arange(3, dtype=np.uint32),
    ),
    "a shape": (lambda: np.zeros((2, 3)), lambda: np.zeros((3, 2))),
    "a jax array": (lambda: jnp.arange(3), lambda: jnp.arange(3) + 1),
    "a dtype": (lambda: jnp.float32, lambda: jnp.bfloat16),
    "a model's size": (lambda: model(), lambda: model(mlp_dim=16)),
    "a schedule": (lambda: adamw(0.1), lambda: adamw(0.2)),
    "an optimiser's setting": (lambda: adamw(0.1), lambda: adamw(0.1, decay=0.2)),
    "a function": (lambda: closing_over, lambda: with_default),
}


@pytest.mark.parametrize("change", CHANGES)
def test_equal_values_have_one_digest_and_a_change_another(change):
    value, changed = CHANGES[change]
    assert digest(value()) == digest(value())
    assert digest(value()) != digest(changed())


@pytest.mark.parametrize(
    "value",
    [
        io.BytesIO(b"x"),
        threading.Lock(),
        iter([1]),
        np.random.default_rng(0),
        np.array([object()]),
        np.zeros(2**20),  # 8 MiB: a digest of it would take as long as tracing
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_of_unknown_content_has_none(value):
    with pytest.raises(Undescribable, match="depends on an object|closes over an array"):
        digest(closing_over([value]))


def test_a_value_may_refer_to_itself():
    loop, other = [1], [1]
    loop.append(loop)
    other.append(other)
    assert digest(loop) == digest(other)
    other.append(2)
    assert digest(loop) != digest(other)


def test_code_and_globals_of_a_function_in_no_file_count():
    def written(text, **names):
        module = types.ModuleType("notebook")
        vars(module).update(names)
        exec(text, vars(module))  # as a notebook does
        return vars(module)["f"]

    text = "def f(x):\n  return x + scale"
    assert digest(written(text, scale=1)) == digest(written(text, scale=1))
    assert digest(written(text, scale=1)) != digest(written(text, scale=2))
    assert digest(written(text, scale=1)) != digest(written(text.replace("+", "*"), scale=1))


def test_a_class_in_no_file_is_undescribable():
    made = type("Made", (), {"__module__": "notebook"})
    with pytest.raises(Undescribable, match=r"notebook\.Made, which is in no file"):
        digest(made)


def test_the_digest_of_source_sees_every_python_file(tmp_path):
    file = tmp_path / "model" / "kernels" / "new.py"
    file.parent.mkdir(parents=True)
    file.write_text("x = 1\n")
    digests = set()
    for text in ("x = 1\n", "x = 2\n"):
        file.write_text(text)
        sources.own_digest.cache_clear()
        digests.add(sources.own_digest(tmp_path))
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers" / "new.py").write_text("")
    sources.own_digest.cache_clear()
    digests.add(sources.own_digest(tmp_path))
    sources.own_digest.cache_clear()
    assert len(digests) == 3


def test_loaded_files_of_a_user_count(tmp_path, monkeypatch):
    file = tmp_path / "my_method.py"
    file.write_text("x = 1\n")
    before = sources.other_digest()
    module = types.ModuleType("my_method")
    module.__file__ = str(file)
    monkeypatch.setitem(__import__("sys").modules, "my_method", module)
    loaded = sources.other_digest()
    file.write_text("x = 2\n")
    assert len({before, loaded, sources.other_digest()}) == 3
