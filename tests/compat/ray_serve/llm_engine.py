"""An engine for Ray Serve LLM that answers at once: what surrounds it, from the ingress to the server, is Ray's own."""

import asyncio
import os
from collections.abc import AsyncGenerator
from typing import Any

from ray.llm._internal.serve.core.configs.openai_api_models import ChatCompletionResponse
from ray.llm._internal.serve.core.engine.protocol import LLMEngine

_TOKEN_S = 0.002


class ScriptedEngine(LLMEngine):  # type: ignore[misc]  # Ray has no types
    """Says `word` as often as `max_tokens` allows, and in which process."""

    def __init__(self, llm_config: Any) -> None:
        self._model = llm_config.model_id

    async def start(self) -> None:
        pass

    def routing_stats(self) -> dict[str, Any]:
        return {}

    async def resolve_lora(self, lora_model: Any) -> None:
        raise NotImplementedError

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        tokens = int(request.max_completion_tokens or request.max_tokens or 8)
        if request.stream:
            for _ in range(tokens):
                await asyncio.sleep(_TOKEN_S)
                yield 'data: {"choices": [{"index": 0, "delta": {"content": "word "}}]}\n\n'
            yield "data: [DONE]\n\n"
            return
        await asyncio.sleep(_TOKEN_S * tokens)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": f"{os.getpid()} " + "word " * (tokens - 1)},
            "finish_reason": "stop",
        }
        usage = {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": tokens + 5}
        yield ChatCompletionResponse(model=self._model, choices=[choice], usage=usage)

    async def completions(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        raise NotImplementedError
        yield

    async def embeddings(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        raise NotImplementedError
        yield

    async def transcriptions(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        raise NotImplementedError
        yield

    async def reset_prefix_cache(self) -> None:
        pass

    async def check_health(self) -> None:
        pass


def build(args: dict[str, Any]) -> Any:
    """The OpenAI app as the documentation of Ray Serve LLM builds it."""
    from ray.serve.llm import LLMConfig, build_openai_app

    config = LLMConfig(
        model_loading_config={"model_id": "tiny", "model_source": args["source"]},
        deployment_config={"num_replicas": 2, "max_ongoing_requests": 4},
        placement_group_config={"bundles": [{"CPU": 0.1}]},
        runtime_env={"env_vars": {"RAYLLM_VLLM_ENGINE_CLS": "tests.compat.ray_serve.llm_engine:ScriptedEngine"}},
    )
    return build_openai_app({"llm_configs": [config]})
