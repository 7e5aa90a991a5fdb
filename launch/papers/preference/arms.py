"""Arms of the sweep as the report names and orders them."""

import dataclasses

from launch.papers.preference import sweep

# Method that learns from pairs -> (its name, the letter of its strength).
METHODS = {"dpo": ("DPO", "β"), "ipo": ("IPO", "τ"), "hinge": ("Hinge", "α")}
ONLINE = {"online_dpo": "online DPO", "rloo": "RLOO", "grpo": "GRPO", "ppo": "PPO"}
_STRENGTHS = {"dpo": sweep.DPO, "ipo": sweep.IPO, "hinge": sweep.HINGE}


@dataclasses.dataclass(frozen=True)
class Arm:
    """A method of METHODS with its strength (the hinge's: the weight of its regulariser), and the weight of an NLL term.

    One of ONLINE has neither.
    """

    method: str
    strength: float | None = None
    nll: float = 0.0

    @property
    def direct(self) -> bool:
        """Whether it learns from pairs, as what the paper is about."""
        return self.method in METHODS

    @property
    def name(self) -> str:
        """As the sweep has it."""
        if self.strength is None:
            return self.method
        return sweep.arm(self.method, self.strength, self.nll)

    @property
    def setting(self) -> str:
        """Without the method."""
        if self.strength is None:
            return ""
        beside = f", λ = {self.nll:g}" if self.nll else ""
        return f"{METHODS[self.method][1]} = {self.strength:g}{beside}"

    @property
    def label(self) -> str:
        return f"{METHODS[self.method][0]} {self.setting}" if self.direct else ONLINE[self.method]


def of(method: str) -> list[Arm]:
    """All arms of a method of METHODS, from the one that moves furthest."""
    return [
        Arm(method, strength, weight)
        for strength, weights in _STRENGTHS[method].items()
        for weight in weights
    ]


def furthest(method: str) -> Arm:
    """The arm of a method that moves furthest, without an NLL term."""
    return Arm(method, next(iter(_STRENGTHS[method])))


DIRECT = {arm.name: arm for method in METHODS for arm in of(method)}
ARMS = DIRECT | {method: Arm(method) for method in sweep.ONLINE}
