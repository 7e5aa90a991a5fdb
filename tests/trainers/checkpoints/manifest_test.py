"""The digests against a plain integer implementation, and against every kind of damage."""

import itertools
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from espalier.trainers.checkpoints import manifest

DTYPES = [
    "float32",
    "bfloat16",
    "float16",
    "int32",
    "int8",
    "uint8",
    "bool",
    "float64",
    "complex64",
]


def random_array(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    return (rng.standard_normal(shape) * 50).astype(jnp.dtype(dtype))


def plain_key(axis, index):
    """splitmix64 in Python integers."""
    mask = (1 << 64) - 1
    z = (((axis + 1) << 48) + index) & mask
    z = (z * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) | 1


def plain_digest(values):
    """The formula of the module, element by element."""
    values = np.atleast_1d(values)
    total = 0
    for index in np.ndindex(values.shape):
        data = values[index].tobytes()
        pieces = [data] if len(data) <= 4 else [data[i : i + 4] for i in range(0, len(data), 4)]
        for number, piece in enumerate(pieces):
            term = int.from_bytes(piece, "little")
            for axis, i in enumerate(index):
                term *= plain_key(axis, i)
            if len(data) > 4:
                term *= plain_key(len(index), number)
            total += term
    return total % (1 << 64)


def whole(values):
    return manifest.block_digest(values, (0,) * values.ndim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (0, 3)])
def test_digest_is_the_documented_sum(dtype, shape):
    values = random_array(shape, dtype)
    assert whole(values) == plain_digest(values)


def test_long_axes_are_contracted_in_pieces(monkeypatch):
    values = random_array((4, 11), "float32")
    monkeypatch.setattr(manifest, "_KEYS_AT_ONCE", 3)
    assert whole(values) == plain_digest(values)


def test_strided_blocks_count_by_value():
    values = random_array((6, 5), "float32")
    assert whole(values.T) == plain_digest(np.ascontiguousarray(values.T))
    assert whole(values.T) != whole(values)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float64"])
def test_every_single_bit_counts(dtype):
    values = random_array((3, 4), dtype)
    before = whole(values)
    for bit in range(values.nbytes * 8):
        data = bytearray(values.tobytes())
        data[bit // 8] ^= 1 << bit % 8
        assert whole(np.frombuffer(data, values.dtype).reshape(values.shape)) != before


def test_pairs_of_top_bits_count():
    # The trap of sums modulo 2^32: the signs of two elements would cancel.
    values = random_array((4, 6), "float32")
    before = whole(values)
    for i, j in itertools.combinations(range(values.size), 2):
        flipped = values.copy()
        flipped.flat[[i, j]] *= -1
        assert whole(flipped) != before


@pytest.mark.parametrize("damage", ["rows", "elements", "transpose", "zeros", "shift", "repeat"])
def test_structured_damage_counts(damage):
    values = random_array((8, 8), "float32")
    other = values.copy()
    if damage == "rows":
        other[[2, 5]] = other[[5, 2]]
    elif damage == "elements":
        other[1, 1], other[6, 3] = values[6, 3], values[1, 1]
    elif damage == "transpose":
        other = values.T
    elif damage == "zeros":
        other[:4] = 0
    elif damage == "shift":
        other = np.roll(values, 1)
    else:
        other[4:] = values[:4]
    assert whole(other) != whole(values)


@pytest.mark.parametrize("seed", range(5))
def test_any_split_adds_up(seed):
    rng = np.random.default_rng(seed)
    values = random_array((9, 10, 4), "bfloat16", seed)
    cuts = [[0, *sorted(rng.integers(0, size + 1, 2)), size] for size in values.shape]
    total = 0
    for bounds in itertools.product(*(list(itertools.pairwise(cut)) for cut in cuts)):
        block = values[tuple(slice(low, high) for low, high in bounds)]
        total += manifest.block_digest(block, [low for low, _ in bounds])
    assert total % (1 << 64) == whole(values)


@pytest.mark.parametrize("shape", [(1,), (8,), (2, 4), (4, 2)])
@pytest.mark.parametrize("spec", [P(), P("a"), P(None, "a"), P("a", "b"), P(("a", "b"))])
def test_digest_does_not_depend_on_the_mesh(shape, spec):
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(*shape, *[1] * (2 - len(shape)))
    sharding = NamedSharding(Mesh(devices, ("a", "b")), spec)
    values = random_array((8, 16), "bfloat16")
    array = jax.device_put(values, sharding)
    blocks = manifest.owned_blocks(array)
    assert sum(block.size for _, block in blocks) == values.size  # Replicas count once.
    assert manifest.digests({"x": blocks}) == {"x": whole(values)}


def test_shares_of_processes_add_up_modulo_the_word():
    top = (1 << 64) - 1
    assert manifest.add_digests([{"x": top, "y": 1}, {"x": 3}]) == {"x": 2, "y": 1}


def an_entry():
    return manifest.Manifest(
        arrays={"params/w": manifest.ArrayEntry((2, 3), "bfloat16", 0x00123)},
        files={"state/d/x": (12, "0badf00d")},
    )


def test_manifest_round_trip():
    assert manifest.Manifest.from_bytes(an_entry().to_bytes()) == an_entry()


def test_every_bit_of_a_manifest_counts():
    data = an_entry().to_bytes()
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="manifest|checksum"):
            manifest.Manifest.from_bytes(bytes(damaged))


@pytest.mark.parametrize(
    "data", [b"", b"null", b"[]", b'{"version": 1}', b"\xff\xfe", b"[" * 100000]
)
def test_what_is_no_manifest_is_refused(data):
    with pytest.raises(ValueError, match="is not a manifest"):
        manifest.Manifest.from_bytes(data)


def test_files_are_checked_by_size_and_content(tmp_path):
    folder = epath.Path(tmp_path)
    for name in "abcd":
        (folder / name).write_bytes(name.encode() * 100)
    files = {name: manifest.file_checksum(folder / name) for name in "abcd"}
    assert manifest.check_files(folder, files) == {}
    (folder / "a").write_bytes(b"a" * 99 + b"A")
    (folder / "b").write_bytes(b"b" * 99)
    (folder / "c").unlink()
    assert manifest.check_files(folder, files) == {
        "a": "does not match its checksum",
        "b": "has 99 bytes instead of 100",
        "c": "is missing",
    }


def test_a_file_outside_of_the_step_or_without_an_end_is_never_read(tmp_path):
    folder = tmp_path / "step"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"x")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "zero").symlink_to("/dev/zero")
    os.mkfifo(folder / "fifo")
    for name in ("../secret", str(tmp_path / "secret"), "link", "zero", "fifo", "/dev/zero"):
        problem = "is not a file of the checkpoint itself"
        found = manifest.check_files(epath.Path(folder), {name: (1, "0")})
        assert found == {name: problem}, name


def test_file_checksum_is_crc32(tmp_path):
    (tmp_path / "x").write_bytes(b"123456789")  # The check value of CRC-32.
    assert manifest.file_checksum(epath.Path(tmp_path / "x")) == (9, "cbf43926")


def test_eight_bit_floats_have_a_digest():
    values = np.arange(-4, 4, dtype=np.float32).astype(ml_dtypes.float8_e4m3fn)
    assert whole(values) == plain_digest(values)
