"""The settings of Ray as the engine: where elastic replicas run that are more than one machine can hold."""

from __future__ import annotations

from pydantic import Field, field_validator

from swarmx.core.errors import ConfigError
from swarmx.providers.ray.placing import address_of
from swarmx.replica_config import Seconds, Section


class RaySection(Section):
    """A Ray cluster on which all replicas under `[[elastic]]` run; without an address they run on this host."""

    address: str | None = Field(
        None,
        description="ray://auto for the cluster of which this host is a node, HOST:PORT for one by its address, "
        "ray://HOST:PORT for a Ray Client server; `swarmx up --on` overrides it.",
    )
    namespace: str = Field(
        "swarmx",
        description="Where the actors have their names; each SwarmX on a cluster needs its own.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
    )
    keep: bool = Field(
        False, description="Replicas go on when SwarmX stops, and the next start takes them over; else they are ended."
    )
    orphan_s: Seconds = Field(
        900.0, description="A replica that no SwarmX has asked for anything for so long ends by itself."
    )

    @field_validator("address")
    @classmethod
    def _is_one(cls, address: str | None) -> str | None:
        try:
            if address is not None:
                address_of(address)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return address
