"""Forecasts of calls: read once, refined while a call waits, scored when the outcome is known."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from swarmx.core.forecast import Forecast, point
from swarmx.core.messages import CallReady, ForecastRefined, ForecastScored
from swarmx.core.nouns import Call
from swarmx.core.prompts import Encoding, PromptText, cut
from swarmx.runtime.call_ends import CallRefused
from tests.agents.worlds import PROMPT, a_call
from tests.runtime.calls.scenes import Make, Scene, plain, with_status


class Reading:
    """A forecaster that reads: the vector is the size of the prompt, the forecast is the vector."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.read: list[bytes] = []
        self.learned: list[tuple[str, float]] = []

    def encode(self, call: Call, prompt: PromptText) -> Encoding:
        self.read.append(prompt.text)
        return Encoding(encoder=f"encoder-{self.version}", vector=np.array([len(prompt.text), 1e9], dtype=np.float32))

    def forecast(self, call: Call, encoding: Encoding) -> Forecast:
        known = point(float(encoding.vector[0]), unit="tokens", source="neural")
        return msgspec.structs.replace(known, version=self.version)

    def observe(self, call: Call, encoding: Encoding, work_done: float) -> None:
        self.learned.append((encoding.encoder, work_done))


class AtOnce(Reading):
    """A refiner that answers when the test says so."""

    def __init__(self) -> None:
        super().__init__("slow")
        self.asked: dict[str, PromptText] = {}

    def ask(self, call: Call, prompt: PromptText) -> None:
        self.asked[call.call_id] = prompt

    def forget(self, call_id: str) -> None:
        self.asked.pop(call_id)

    def answer(self, s: Scene, call_id: str = "c") -> None:
        call = a_call(call_id)
        encoding = self.encode(call, cut(b"x" * 77))
        s.calls.refined(call_id, encoding, self.forecast(call, encoding))


def scores(s: Scene) -> list[ForecastScored]:
    return [message for message in s.heard if isinstance(message, ForecastScored)]


async def test_a_prompt_is_read_once_even_when_its_call_is_retried(scene: Make) -> None:
    forecaster = Reading("fast")
    s = scene(forecaster=forecaster)
    await s.serve("a", with_status(503))
    await s.serve("b", plain)
    await s.ask(cut(b"Why?"))
    assert [decision.forecast.mean for decision in s.decisions()] == [4.0, 4.0]
    assert forecaster.read == [b"Why?"]
    assert forecaster.learned == [("encoder-fast", 5.0)]


async def test_a_record_keeps_the_encoding_and_never_the_prompt(scene: Make) -> None:
    s = scene(forecaster=Reading("fast"))
    await s.serve("a", plain)
    await s.ask(cut(b"the secret"))
    record = s.check_settled("finished")
    assert (record.encoder, record.forecast_version, record.forecast_source) == ("encoder-fast", "fast", "neural")
    assert np.frombuffer(record.encoding, dtype="<f2").tolist() == [10.0, 65504.0]
    assert b"secret" not in msgspec.json.encode(record)


async def test_a_forecast_is_scored_when_the_outcome_is_known(scene: Make) -> None:
    s = scene(forecaster=Reading("fast"))
    await s.serve("a", plain)
    await s.ask(cut(b"Why?"))
    (score,) = scores(s)
    assert (score.head, score.version, score.prompt_class, score.covered) == ("length", "fast", "report/writer", False)


async def test_a_forecast_by_plain_statistics_has_no_weights_that_could_be_scored(scene: Make) -> None:
    s = scene()
    await s.serve("a", plain)
    await s.ask()
    assert scores(s) == []


async def test_a_forecast_of_a_call_without_an_outcome_is_not_scored(scene: Make) -> None:
    s = scene(forecaster=Reading("fast"))
    await s.serve("a", with_status(400))
    with pytest.raises(CallRefused):
        await s.ask()
    assert scores(s) == []


async def test_a_refined_forecast_is_in_force_and_the_first_is_scored_and_trained_on(scene: Make) -> None:
    forecaster, refiner = Reading("fast"), AtOnce()
    s = scene(forecaster=forecaster, refiner=refiner)
    s.upstream.then = lambda: refiner.answer(s)
    await s.serve("a", plain)
    await s.ask(cut(b"Why?"))
    (refined,) = [message for message in s.heard if isinstance(message, ForecastRefined)]
    assert (refined.call_id, refined.forecast.mean) == ("c", 77.0)
    record = s.check_settled("finished")
    assert (record.forecast_p50, record.forecast_version, record.encoder) == (77.0, "slow", "encoder-fast")
    assert [score.version for score in scores(s)] == ["fast"]
    assert forecaster.learned == [("encoder-fast", 5.0)]
    assert refiner.learned == [("encoder-slow", 5.0)]


async def test_the_router_hears_how_long_the_workflow_of_a_call_still_takes(scene: Make) -> None:
    known = {"w": point(12.5, unit="s")}
    s = scene(path_of=lambda call: known.get(call.workflow_id))
    await s.serve("a", plain)
    await s.ask()
    await s.calls.answer(msgspec.structs.replace(a_call("alone"), workflow_id=""), PROMPT, b"{}")
    assert [message.path for message in s.heard if isinstance(message, CallReady)] == [known["w"], None]
    (decision,) = s.decisions("c")
    assert decision.workflow is not None
    assert decision.workflow.remaining_s == 12.5


async def test_a_call_that_has_ended_is_neither_refined_nor_waited_for(scene: Make) -> None:
    refiner = AtOnce()
    s = scene(refiner=refiner)
    await s.serve("a", plain)
    await s.ask()
    assert refiner.asked == {}
    refiner.answer(s)
    assert not any(isinstance(message, ForecastRefined) for message in s.heard)
