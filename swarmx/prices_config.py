"""What models cost, under `[prices."MODEL"]`: what the money budgets of workflows go by."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from swarmx.replica_config import Section
from swarmx.workflows.spending import Price

_Amount = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]

ModelName = Annotated[str, Field(min_length=1, max_length=200)]


class PriceEntry(Section):
    """The price of one model, in any currency, the same for all. A model without an entry costs nothing."""

    input_per_million: _Amount = Field(0.0, description="What a million tokens of prompts cost.")
    output_per_million: _Amount = Field(0.0, description="What a million tokens of answers cost.")
    per_image: _Amount = Field(0.0, description="What an image costs.")

    def price(self) -> Price:
        return Price(**self.model_dump())
