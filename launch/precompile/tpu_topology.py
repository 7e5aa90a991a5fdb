"""TPU chips: descriptions of absent slices, for which a CPU host with the `tpu` extra can compile, and published figures.

A topology is named like `v5e:4x4`: generation and chips along each dimension of the torus. `2xv5e:16x16` is two slices of
256 chips each, joined by the data centre's network.

Sources: the pages of Cloud TPU on each generation (https://docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e) for FLOP/s,
main memory and the data centre's network; the bandwidth of a link is the table of
https://jax-ml.github.io/scaling-book/tpus. `hbm_bytes` is the memory that the compiler grants to a program.
"""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
import signal
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # jax is imported only after the environment is set
    import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation of TPU chips.

    Attributes:
      dimensions: number of dimensions of the torus.
      hbm_bytes: memory available to a program; the runtime uses the rest.
      peak_flops: dense bfloat16 FLOP/s of a chip.
      hbm_rate: bytes/s to and from main memory.
      link_rate: bytes/s that one link sends in one direction; a chip has two links in each dimension.
      network_rate: bytes/s that a chip sends to other slices, its share of its host's network.
      options: further arguments of the topology that make one device of one chip.
    """

    dimensions: int
    hbm_bytes: int
    peak_flops: float
    hbm_rate: float
    link_rate: float
    network_rate: float
    options: tuple[tuple[str, str], ...] = ()

    @property
    def ring_rate(self) -> float:
        """Bytes/s a chip sends over the two links of one dimension (a ring in both directions)."""
        return 2 * self.link_rate

    @property
    def wire_rate(self) -> float:
        """Bytes/s a chip sends over all its links."""
        return self.dimensions * self.ring_rate


CHIPS = {
    # Two cores that act as one device.
    "v4": Chip(
        *(3, int(30.75 * GIB), 275e12, 1.2e12, 45e9, 6.25e9),
        options=(("chip_config_name", "megacore"),),
    ),
    "v5e": Chip(2, int(15.75 * GIB), 197e12, 0.819e12, 45e9, 3.125e9),
    "v5p": Chip(3, int(95.74 * GIB), 459e12, 2.765e12, 90e9, 6.25e9),
    "v6e": Chip(2, int(31.25 * GIB), 918e12, 1.638e12, 90e9, 12.5e9),
}

# Shapes of slices by their number of dimensions, of those pages.
_SHAPES = {
    2: "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16 and 16x16",
    3: "1x1x1, 2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, 4x8x8, 8x8x8 and larger ones of multiples of 4",
}


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that each resource of a chip is busy in one step, at its published rate.

    Attributes:
      compute: all FLOPs of the program, recomputation included.
      hbm: estimated traffic of the main memory.
      links: bytes sent within a slice, if the collectives use the links of all dimensions at once.
      one_ring: the same bytes, if they use the links of one dimension.
      network: bytes sent between slices.
      model: the model's FLOPs alone; None for a program that they are not known of.
    """

    compute: float
    hbm: float
    links: float
    one_ring: float
    network: float
    model: float | None

    @property
    def step(self) -> float:
        """The least seconds of a step: the busiest resource's, if all others work meanwhile."""
        return max(self.compute, self.hbm, self.links, self.network)

    @property
    def step_one_ring(self) -> float:
        """The same, if collectives use the links of one dimension."""
        return max(self.step, self.one_ring)

    @property
    def bound_by(self) -> str:
        names = ("compute", "hbm", "links", "network")
        return max(names, key=lambda name: getattr(self, name))

    def as_json(self) -> dict[str, Any]:
        step, ring = self.step, self.step_one_ring
        return {
            **dataclasses.asdict(self),
            "step": step,
            "step_one_ring": ring,
            "bound_by": self.bound_by,
            "mfu_bound": None if self.model is None else self.model / step,
            "mfu_bound_one_ring": None if self.model is None else self.model / ring,
        }


def roofline(
    chip: Chip,
    *,
    flops: float,
    hbm_bytes: float,
    sent: float,
    sent_between_slices: float,
    model_flops: float | None,
) -> Roofline:
    """Returns the seconds of a step from one chip's FLOPs and bytes."""
    return Roofline(
        compute=flops / chip.peak_flops,
        hbm=hbm_bytes / chip.hbm_rate,
        links=sent / chip.wire_rate,
        one_ring=sent / chip.ring_rate,
        network=sent_between_slices / chip.network_rate,
        model=None if model_flops is None else model_flops / chip.peak_flops,
    )


class TopologyError(ValueError):
    """Raised for an invalid topology, or on a host that cannot compile for TPUs."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of chips of one generation; `shape` is the number of a slice's chips along each dimension."""

    generation: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def slice_name(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def num_chips(self) -> int:
        """Chips of all slices."""
        return self.slices * math.prod(self.shape)

    def __str__(self) -> str:
        return self.slice_name if self.slices == 1 else f"{self.slices}x{self.slice_name}"


def parse(name: str) -> Topology:
    """Parses the name of a topology, such as `v5e:4x4` or `2xv5e:16x16`.

    Raises:
      TopologyError: the generation is unknown, or the shape has the wrong rank.
    """
    match = re.fullmatch(r"(?:([1-9]\d*)x)?(\w+):([1-9]\d*(?:x[1-9]\d*)*)", name)
    examples = "for example v5e:4x4, v6e:8x8, v5p:4x4x4, v5e:1x1, or 2xv5e:16x16 for two slices"
    if match is None or match[2] not in CHIPS:
        raise TopologyError(
            f"--topology={name} is not a TPU topology: give one of {', '.join(CHIPS)}, a colon and the chips "
            f"along each dimension, {examples}."
        )
    generation, sizes = match[2], tuple(int(size) for size in match[3].split("x"))
    rank = CHIPS[generation].dimensions
    if len(sizes) != rank:
        raise TopologyError(
            f"--topology={name}: a {generation} slice has {rank} dimensions, not {len(sizes)}; "
            f"{examples}."
        )
    return Topology(generation, sizes, int(match[1] or 1))


def prepare_environment() -> None:
    """Sets the environment variables that libtpu needs on hosts without chips; call it before importing jax."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    # The cache cannot read back programs for absent devices.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    defaults = {
        "TPU_SKIP_MDS_QUERY": "1",  # there is no cloud metadata server to wait for
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # only silences a warning, for every topology
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing holds a chip that two processes could fight over
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def missing() -> str:
    """Returns why this host cannot compile for TPUs, with the remedy; '' if it can."""
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed: pip install 'jax[tpu]' (the extra 'tpu': pip install -e .[tpu])"
    return ""


def versions() -> dict[str, str]:
    """Returns the versions that determine the compiled program."""
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}


def devices(topology: Topology) -> Sequence["jax.Device"]:
    """Returns devices of absent slices, one per chip: programs compile for them but do not run.

    Raises:
      TopologyError: libtpu is missing, or does not know the slice.
    """
    reason = missing()
    if reason:
        raise TopologyError(f"Compiling for {topology} needs libtpu, but {reason}.")
    import jax
    from jax.experimental import topologies

    options: dict[str, object] = dict(topology.chip.options)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if math.prod(topology.shape) == 1:
        # By default hosts hold 2 x 2 chips.
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.slice_name, **options
        ).devices
    except jax.errors.JaxRuntimeError as error:
        if "Topology layout" not in str(error):
            raise TopologyError(f"--topology={topology}: {error}") from error
        raise TopologyError(
            f"--topology={topology}: no {topology.generation} slice has this shape; there are {_SHAPES[topology.chip.dimensions]}."
        ) from None
    # libtpu has put its own handler in the place of Python's, which prints 20 lines of its stack and ends the process.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    if len(devices) != topology.num_chips:
        raise TopologyError(
            f"--topology={topology} has {topology.num_chips} chips, but libtpu "
            f"{versions()['libtpu']} describes {len(devices)} devices."
        )
    return devices
