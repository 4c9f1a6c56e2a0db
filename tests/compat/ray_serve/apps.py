"""Serve apps as somebody could have them: nothing in them knows of SwarmX."""

import asyncio
import gc
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

from ray import serve

ACTOR = {"num_cpus": 0.1}


@serve.deployment(ray_actor_options=ACTOR, max_ongoing_requests=4, graceful_shutdown_timeout_s=1)
class Model:
    """Takes as long as the prompt says, if it says so; answers with as many words as it was asked for."""

    async def __call__(self, asked: Any) -> dict[str, Any]:
        asked = asked if isinstance(asked, dict) else {"prompt": str(asked)}
        await asyncio.sleep(float(asked.get("seconds", 0.02)))
        return {
            "text": "word " * int(asked.get("words", 10)),
            "pid": os.getpid(),
            "replica": serve.get_replica_context().replica_id.unique_id,
        }

    async def stream(self, words: int) -> AsyncIterator[str]:
        for word in range(words):
            await asyncio.sleep(0.005)
            yield str(word)

    async def fails(self, asked: Any) -> None:
        raise ValueError(f"no answer to {asked}")

    async def dies(self, marker: str) -> str:
        """The first call ends its process without a word; the next one, anywhere, is answered and leaves its name."""
        from swarmx.compat.ray_serve import idempotency_key

        if os.path.exists(marker):
            open(f"{marker}-again", "w").close()
            with open(marker) as file:
                return f"{file.read()} {idempotency_key()}"
        with open(marker, "w") as file:
            file.write(idempotency_key())
        os._exit(1)


@serve.deployment(ray_actor_options=ACTOR, max_ongoing_requests=100, graceful_shutdown_timeout_s=1)
class Ingress:
    """Asks the model four things at a time for each request."""

    def __init__(self, model: Any) -> None:
        self._model = model

    async def __call__(self, request: Any) -> dict[str, Any]:
        text = (await request.body()).decode()
        answers = await asyncio.gather(*[self._model.remote(f"{text} {number}") for number in range(4)])
        return {"answers": len(answers)}

    async def collected(self, module: str) -> bool:
        """Whether garbage collections of this process go through the module, which is loaded."""
        names = vars(sys.modules[module])
        return any(one is names for one in gc.get_objects())


app = Ingress.bind(Model.bind())
