"""The coordinator's model is kept running: real processes, with a small web server in place of vLLM."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from swarmx.core.control import Prompt
from swarmx.core.errors import ConfigError
from swarmx.providers.coordinator_model import CoordinatorModel
from swarmx.runtime.model import OpenAiModel

# Serves the model's folder, which has a file `health`; fails to start while there is a file `broken`.
SERVE = f"""
echo start >> "$1/starts"
[[ ! -e "$1/broken" ]] || exit 3
echo $$ > "$1/pid"
exec {sys.executable} -m http.server "$3" --bind 127.0.0.1 --directory "$1"
"""
PROMPT = Prompt(system="s", user="u", tools=(), max_tokens=5)

pytestmark = pytest.mark.process


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a model, in a checkout that serves it."""
    (tmp_path / "scripts" / "vllm").mkdir(parents=True)
    (tmp_path / "scripts" / "vllm" / "serve.sh").write_text(SERVE)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "health").write_text("ok")
    monkeypatch.chdir(tmp_path)
    return model


@asynccontextmanager
async def kept(folder: Path) -> AsyncIterator[CoordinatorModel]:
    server = CoordinatorModel(
        model_dir=folder, name="small", log=folder / "logs" / "log", first_wait_s=0.05, longest_wait_s=0.1
    )
    task = asyncio.create_task(server.run())
    try:
        yield server
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(60.0):
        while not happened():
            await asyncio.sleep(0.01)


def starts(folder: Path) -> int:
    file = folder / "starts"
    return len(file.read_text().splitlines()) if file.exists() else 0


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_a_server_that_is_killed_is_started_again(folder: Path) -> None:
    async with kept(folder) as server:
        await until(lambda: server.url is not None)
        first, pid = server.url, int((folder / "pid").read_text())
        os.kill(pid, signal.SIGKILL)
        await until(lambda: starts(folder) == 2 and server.url is not None)
        assert server.url != first or int((folder / "pid").read_text()) != pid
        last = int((folder / "pid").read_text())
        assert alive(last)
    assert server.url is None
    assert not alive(last)


async def test_while_it_is_down_the_model_is_unreachable(folder: Path) -> None:
    (folder / "broken").touch()
    async with kept(folder) as server:
        model = OpenAiModel(url=lambda: server.url, name="small")
        await until(lambda: starts(folder) >= 3)
        assert server.url is None
        assert (await model.reply(PROMPT, deadline_s=5.0)).error == "unreachable"
        (folder / "broken").unlink()
        await until(lambda: server.url is not None)
        assert "501" in (await model.reply(PROMPT, deadline_s=5.0)).detail  # a plain web server takes no POST
        await model.close()


def test_a_folder_without_a_model_is_refused_at_once(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="holds no model"):
        CoordinatorModel(model_dir=folder, name="small", log=folder / "log")
