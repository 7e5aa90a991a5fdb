"""Arms of the sweep as the report names and orders them."""

import dataclasses

from launch.sweeps import preference as sweep

# Method -> (its name, the letter of its strength).
METHODS = {"dpo": ("DPO", "β"), "ipo": ("IPO", "τ"), "hinge": ("Hinge", "α")}
_STRENGTHS = {"dpo": sweep.DPO, "ipo": sweep.IPO, "hinge": sweep.HINGE}


@dataclasses.dataclass(frozen=True)
class Arm:
    """A method with its strength (the hinge's: the weight of its regulariser), and the weight of an NLL term."""

    method: str
    strength: float
    nll: float = 0.0

    @property
    def name(self) -> str:
        """As the sweep has it."""
        return sweep.arm(self.method, self.strength, self.nll)

    @property
    def setting(self) -> str:
        """Without the method."""
        beside = f", λ = {self.nll:g}" if self.nll else ""
        return f"{METHODS[self.method][1]} = {self.strength:g}{beside}"

    @property
    def label(self) -> str:
        return f"{METHODS[self.method][0]} {self.setting}"


def of(method: str) -> list[Arm]:
    """All arms of a method, from the one that moves furthest."""
    return [
        Arm(method, strength, weight)
        for strength, weights in _STRENGTHS[method].items()
        for weight in weights
    ]


def furthest(method: str) -> Arm:
    """The arm of a method that moves furthest, without an NLL term."""
    return Arm(method, next(iter(_STRENGTHS[method])))


ARMS = {arm.name: arm for method in METHODS for arm in of(method)}
