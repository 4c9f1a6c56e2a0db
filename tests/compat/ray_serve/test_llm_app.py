"""A Ray Serve LLM app with SwarmX's router on its LLMServer deployment; all but the engine is Ray's and vLLM's own."""

import asyncio
import importlib.util
import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.compat.ray_serve.conftest import HAS_RAY, NO_RAY

HAS_LLM = HAS_RAY and all(importlib.util.find_spec(name) is not None for name in ("vllm", "pyarrow"))
MODEL = Path(__file__).parents[3] / ".models" / "qwen2.5-coder-0.5b-instruct"  # Ray reads its config

pytestmark = [
    pytest.mark.skipif(not HAS_RAY, reason=NO_RAY),
    pytest.mark.skipif(not HAS_LLM, reason="Ray Serve LLM needs vLLM, which is not installed beside Ray here"),
    pytest.mark.skipif(not MODEL.exists(), reason="there is no model to configure; `make setup-vllm` fetches one"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(900),
    pytest.mark.process,
]


def chat(**fields: Any) -> str:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Say it."}], **fields}
    request = urllib.request.Request(
        "http://127.0.0.1:8123/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "x-session-id": "one-workflow"},
    )
    with urllib.request.urlopen(request, timeout=240) as response:  # noqa: S310  # loopback
        return str(response.read().decode())


async def test_the_router_of_an_llm_app_reads_its_prompts_and_learns_from_its_answers(cluster: Path) -> None:
    from swarmx.compat.ray_serve.why import decisions_in
    from tests.compat.ray_serve.deploy import ROUTER, deploy_all

    kwargs = {"log_dir": str(cluster / "llm"), "predictor": "empirical"}
    server = {
        "name": "LLMServer:tiny",
        "request_router_config": {"request_router_class": ROUTER, "request_router_kwargs": kwargs},
    }
    application = {
        "name": "llm",
        "route_prefix": "/",
        "import_path": "tests.compat.ray_serve.llm_engine:build",
        "args": {"source": str(MODEL)},
        "deployments": [server],
    }
    await asyncio.to_thread(deploy_all, [application], patience_s=500.0)
    whole = await asyncio.gather(*[asyncio.to_thread(chat, max_tokens=60) for _ in range(12)])
    answers = [json.loads(text)["choices"][0]["message"]["content"].split() for text in whole]
    assert {len(words) for words in answers} == {60}
    assert len({words[0] for words in answers}) == 2  # both replicas
    streams = await asyncio.gather(*[asyncio.to_thread(chat, max_tokens=30, stream=True) for _ in range(6)])
    assert {text.count("word") for text in streams} == {30}
    await asyncio.sleep(1.0)  # decisions are written twice a second
    decisions = [one for file in (cluster / "llm").glob("*.decisions.jsonl") for one in decisions_in(file)]
    assert len(decisions) == 18
    assert {decision.call.work_limit for decision in decisions} == {60.0, 30.0}
    assert {decision.workflow is None for decision in decisions} == {False}
    learnt = [decision.forecast.mean for decision in decisions if decision.forecast.source == "empirical"]
    assert learnt
    assert all(20.0 <= mean <= 70.0 for mean in learnt)
