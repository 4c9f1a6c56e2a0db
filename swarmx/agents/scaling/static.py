"""static: as many replicas as there are."""

from dataclasses import dataclass
from typing import ClassVar

from swarmx.core.scaling import ScaleView, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Static:
    """As many replicas as there are, within the bounds. The floor that every other policy has to beat."""

    name: ClassVar[str] = "static"

    def target(self, view: ScaleView) -> Target:
        return Target(replicas=view.capacity)
