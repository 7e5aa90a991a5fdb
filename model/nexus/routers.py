"""The initial parameters of a mixture's routers with a gated hidden layer (domain_router.py, mlp_router.py).

Shapes: E experts, M width of an embedding of a domain.
"""

import dataclasses
import math

import numpy as np

from espalier.model.nexus import router_scale
from espalier.model.transforms.base import TransformError


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpRouters:
    """Routers that are an MLP of the token.

    Attributes:
      logit_std: standard deviation of the first logits.
    """

    logit_std: float = 0.1

    def axis(self, name: str) -> int | None:
        return -1 if name == "down/kernel" else None

    def initial(self, name: str, path: str, shape: tuple[int, ...]) -> float | np.ndarray | None:
        if name in ("gate/kernel", "up/kernel"):
            return 1 / math.sqrt(shape[-2])
        return self._down_std(shape) if name == "down/kernel" else None

    def of_last(self) -> "MlpRouters":
        return self

    def _down_std(self, shape: tuple[int, ...]) -> float:
        return router_scale.token_down_std(shape[-2], self.logit_std)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ProjectionRouters(MlpRouters):
    """Routers that project embeddings of the experts' data.

    Attributes:
      domains: the embeddings [E, M].
    """

    domains: np.ndarray

    def axis(self, name: str) -> int | None:
        return -2 if name == "domains" else None

    def initial(self, name: str, path: str, shape: tuple[int, ...]) -> float | np.ndarray | None:
        if name != "domains":
            return super().initial(name, path, shape)
        if self.domains.shape != shape[-2:]:
            raise TransformError(
                f"{path} of the mixture is {list(shape)}, and embeddings are {list(self.domains.shape)}: "
                "set DomainRouter.domain_dim to their width."
            )
        return self.domains

    def of_last(self) -> "ProjectionRouters":
        return dataclasses.replace(self, domains=self.domains[-1:])

    def _down_std(self, shape: tuple[int, ...]) -> float:
        # Rounded: float32 vectors have length 1 only nearly.
        length = round(float(np.linalg.norm(self.domains, axis=-1).mean()), 3)
        return router_scale.down_std(self.domains.shape[-1], shape[-1], self.logit_std, length)
