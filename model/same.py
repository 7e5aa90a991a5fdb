"""A key of caches for objects whose fields may not be hashable, such as models."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
class Same:
    """Compares by the identity of an object, not by its fields, and keeps the object alive."""

    value: Any

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value
