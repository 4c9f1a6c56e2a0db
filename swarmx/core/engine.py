"""The step-time model of a serving engine: one form for the router's costs, the emulator and the simulator."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.resources import files

import msgspec


class EngineProfile(msgspec.Struct, frozen=True, kw_only=True):
    """How long one (model, device) takes.

    A continuous-batching engine runs iterations. One iteration over `n` decoding sequences that hold `c` tokens
    of context together, and `p` prefill tokens in front of which stand `x` tokens of context summed over them, takes

        step_s = step_base_s + decode_seq_s * n + decode_ctx_token_s * c + prefill_token_s * p
                 + prefill_ctx_token_s * x                                                            (1)

    A serial server (images) is the same with `max_batch = 1`: its unit of work (one sampler step on one
    megapixel) takes `step_base_s`. Every call pays `call_base_s` once. All `_s` fields are seconds, at least zero;
    `kv_capacity_tokens` counts the tokens of context that the engine can hold.
    """

    model: str
    device: str
    step_base_s: float
    decode_seq_s: float = 0.0
    decode_ctx_token_s: float = 0.0
    prefill_token_s: float = 0.0
    prefill_ctx_token_s: float = 0.0
    call_base_s: float = 0.0
    kv_capacity_tokens: int = 1_000_000
    max_batch: int = 256
    max_step_tokens: int = 8192
    cost_weight: float = 1.0

    def step_s(
        self, decode_seqs: int, decode_ctx_tokens: float, prefill_tokens: int = 0, prefill_ctx_tokens: float = 0.0
    ) -> float:
        """Seconds of one iteration, equation (1)."""
        return (
            self.step_base_s
            + self.decode_seq_s * decode_seqs
            + self.decode_ctx_token_s * decode_ctx_tokens
            + self.prefill_token_s * prefill_tokens
            + self.prefill_ctx_token_s * prefill_ctx_tokens
        )

    def steps_s(self, steps: int, decode_seqs: int, decode_ctx_tokens: float) -> float:
        """Seconds of `steps` pure decode iterations in a row; the context grows by `decode_seqs` tokens each."""
        growth = self.decode_ctx_token_s * decode_seqs * steps * (steps - 1) / 2.0
        return steps * self.step_s(decode_seqs, decode_ctx_tokens) + growth

    def alone_s(self, prompt_tokens: int, output_tokens: float) -> float:
        """Seconds that a call takes on an idle replica (the first output token comes with the prefill)."""
        decode = max(0.0, output_tokens - 1.0)
        prefill = self.step_s(0, 0.0, prompt_tokens, prompt_tokens * prompt_tokens / 2.0)
        middle = self.step_s(1, prompt_tokens + output_tokens / 2.0)
        return self.call_base_s + prefill + decode * middle

    def scaled(self, factor: float) -> EngineProfile:
        """The same engine `factor` times faster: every `_s` field divided by it."""
        if factor <= 0.0:
            raise ValueError(f"an engine cannot run {factor} times faster, expected a factor above zero")
        times = {name: getattr(self, name) / factor for name in self.__struct_fields__ if name.endswith("_s")}
        return msgspec.structs.replace(self, **times)


class _ProfileFile(msgspec.Struct):
    version: int
    source: str
    profiles: list[dict[str, object]]
    image_profiles: list[dict[str, object]]


@cache
def profiles() -> dict[tuple[str, str], EngineProfile]:
    """The fitted profiles that ship with SwarmX, by (model, device); docs/reference/calibration.md says whence."""
    data = files("swarmx.core").joinpath("data/engine_profiles.json").read_bytes()
    raw = msgspec.json.decode(data, type=_ProfileFile)
    return {(p.model, p.device): p for p in _read(raw)}


def _read(raw: _ProfileFile) -> Iterator[EngineProfile]:
    known = set(EngineProfile.__struct_fields__)
    for row in raw.profiles:
        yield msgspec.convert({k: v for k, v in row.items() if k in known}, EngineProfile, strict=False)
    for row in raw.image_profiles:
        yield EngineProfile(
            model=str(row["model"]),
            device=str(row["device"]),
            step_base_s=float(row["megapixel_step_s"]),  # type: ignore[arg-type]  # JSON numbers
            call_base_s=float(row["base_s"]),  # type: ignore[arg-type]
            max_batch=1,
            cost_weight=float(row["cost_weight"]),  # type: ignore[arg-type]
        )
