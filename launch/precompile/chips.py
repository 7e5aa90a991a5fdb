"""Published figures of TPU chips, and the shortest time that a program can take on them.

Sources: the pages of Cloud TPU on each generation (https://docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e) for FLOP/s,
main memory and the data centre's network; the bandwidth of a link is the table of
https://jax-ml.github.io/scaling-book/tpus. `hbm_bytes` is the memory that the compiler grants to a program.
"""

import dataclasses
from typing import Any

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
