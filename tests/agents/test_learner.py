from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.agents.learner import LearnerAgent, LearnerSettings
from swarmx.core.actions import Action, Retrain, StartTimer, StopTimer, UsePredictor
from swarmx.core.messages import (
    AlertRaised,
    ForecastScored,
    Message,
    PredictorReady,
    RetrainEnded,
    RetrainOutcome,
    TimerFired,
)
from swarmx.core.ports import Output
from swarmx.runtime.journal import FileJournal, replay
from swarmx.runtime.switchboard import Switchboard
from swarmx.runtime.virtual import VirtualShell

SETTINGS = LearnerSettings(window=20, watch=40, cooldown_s=300.0, patience_s=900.0)


def an_outcome(loss: float, *, covered: bool = True, key: tuple[str, str] = ("chat", ""), version: str = "v1",
               head: str = "length") -> ForecastScored:  # fmt: skip
    return ForecastScored(head=head, version=version, prompt_class=key[0], device=key[1], loss=loss, covered=covered)


def ended(retrain: Retrain, outcome: RetrainOutcome, version: str = "v2") -> RetrainEnded:
    return RetrainEnded(
        retrain_id=retrain.retrain_id,
        head=retrain.head,
        outcome=outcome,
        version=version if outcome == "better" else "",
        loss_before=0.4,
        loss_after=0.1,
    )


class Scene:
    """A learner, and a clock of which every outcome takes a second."""

    def __init__(self, settings: LearnerSettings = SETTINGS) -> None:
        self.agent = LearnerAgent(settings)
        self.now_s = 0.0
        self.said: list[Output] = []

    def hear(self, message: Message) -> list[Output]:
        self.now_s += 1.0
        answered = list(self.agent.handle(message, self.now_s))
        self.said += answered
        return answered

    def outcomes(self, count: int, loss: float, **about: object) -> list[Output]:
        """Nine of ten are covered, as they should be."""
        answered: list[Output] = []
        for i in range(count):
            answered += self.hear(an_outcome(loss, covered=i % 10 != 9, **about))  # type: ignore[arg-type]
        return answered

    def drift(self) -> Retrain:
        """Good forecasts, then bad ones until the learner asks for a retraining."""
        self.outcomes(40, 0.1)
        (retrain,) = [output for output in self.outcomes(40, 0.4) if isinstance(output, Retrain)]
        return retrain

    def swap(self, version: str, previous: str) -> list[Output]:
        return self.hear(PredictorReady(head="length", version=version, previous=previous))


def of(kind: type, outputs: list[Output]) -> list[Output]:
    return [output for output in outputs if isinstance(output, kind)]


def test_steady_forecasts_lead_to_nothing() -> None:
    assert Scene().outcomes(500, 0.1) == []


def test_a_loss_that_grew_leads_to_a_retraining_of_its_key() -> None:
    scene = Scene()
    scene.outcomes(100, 0.1, key=("code", "h100"))
    retrain = scene.drift()
    assert (retrain.head, retrain.keys) == ("length", (("chat", ""),))
    assert scene.agent.is_retraining("length")


def test_a_loss_that_is_high_from_the_start_is_no_drift() -> None:
    assert Scene().outcomes(500, 3.0) == []


def test_a_quantile_that_no_longer_covers_leads_to_a_retraining() -> None:
    scene = Scene()
    answers = [output for _ in range(20) for output in scene.hear(an_outcome(0.1, covered=False))]
    assert len(of(Retrain, answers)) == 1


def test_an_episode_is_told_once() -> None:
    scene = Scene()
    scene.drift()
    scene.outcomes(400, 0.4)
    (alert,) = of(AlertRaised, scene.said)
    assert isinstance(alert, AlertRaised)
    assert (alert.kind, alert.subject) == ("forecast_drift", "length")
    assert scene.agent.is_drifting("length")


def test_the_next_episode_is_told_again() -> None:
    scene = Scene()
    scene.hear(ended(scene.drift(), "better"))
    scene.swap("v2", "v1")
    scene.outcomes(200, 0.1, version="v2")
    assert not scene.agent.is_drifting("length")
    scene.outcomes(40, 0.4, version="v2")
    assert len(of(AlertRaised, scene.said)) == 2


def test_one_retraining_of_a_head_at_a_time() -> None:
    scene = Scene()
    scene.drift()
    assert of(Retrain, scene.outcomes(400, 0.4)) == []


def test_what_is_better_is_put_in_force() -> None:
    scene = Scene()
    assert scene.hear(ended(scene.drift(), "better"))[0] == UsePredictor(head="length", version="v2")


@pytest.mark.parametrize("outcome", ["worse", "failed"])
def test_what_is_not_better_is_not(outcome: RetrainOutcome) -> None:
    scene = Scene()
    answers = scene.hear(ended(scene.drift(), outcome))
    assert [type(answer) for answer in answers] == [StopTimer, StartTimer]


def test_the_next_retraining_waits_for_the_cooldown_twice_as_long_after_a_failure() -> None:
    scene = Scene()
    answers = scene.hear(ended(scene.drift(), "failed"))
    assert answers[1] == StartTimer(key="cool:length", at_s=scene.now_s + 600.0)
    assert of(Retrain, scene.outcomes(100, 0.4)) == []
    scene.hear(TimerFired(key="cool:length"))
    (retrain,) = of(Retrain, scene.outcomes(20, 0.4))
    assert isinstance(retrain, Retrain)
    answers = scene.hear(ended(retrain, "failed"))
    assert answers[1] == StartTimer(key="cool:length", at_s=scene.now_s + 1200.0)


def test_a_new_version_that_is_worse_is_rolled_back() -> None:
    scene = Scene()
    scene.hear(ended(scene.drift(), "better"))
    scene.swap("v2", "v1")
    answers = scene.outcomes(40, 0.9, version="v2")
    assert of(UsePredictor, answers) == [UsePredictor(head="length", version="v1")]
    scene.swap("v1", "v2")
    assert of(UsePredictor, scene.outcomes(100, 0.4)) == []


def test_a_new_version_that_is_no_worse_stays() -> None:
    scene = Scene()
    scene.hear(ended(scene.drift(), "better"))
    scene.swap("v2", "v1")
    assert of(UsePredictor, scene.outcomes(200, 0.1, version="v2")) == []


def test_a_version_that_somebody_else_put_in_force_is_not_rolled_back() -> None:
    scene = Scene()
    scene.outcomes(40, 0.1)
    scene.swap("v9", "v1")
    assert of(UsePredictor, scene.outcomes(200, 0.9, version="v9")) == []


def test_outcomes_of_another_version_do_not_count() -> None:
    scene = Scene()
    scene.outcomes(40, 0.1)
    for _ in range(30):
        assert scene.outcomes(9, 5.0, version="v0") == []
        assert scene.outcomes(1, 0.1) == []


def test_a_version_that_is_all_that_is_seen_is_the_one_in_force() -> None:
    scene = Scene()
    scene.outcomes(1, 0.5, version="fallback")
    assert scene.drift().head == "length"


def test_late_doubled_and_foreign_answers_change_nothing() -> None:
    scene = Scene()
    retrain = scene.drift()
    other = msgspec.structs.replace(retrain, retrain_id="length-0")
    assert scene.hear(ended(other, "better")) == []
    scene.hear(ended(retrain, "better"))
    assert scene.hear(ended(retrain, "better")) == []
    assert scene.hear(ended(msgspec.structs.replace(retrain, head="latency"), "better")) == []
    assert scene.hear(TimerFired(key="cool:unknown")) == scene.hear(TimerFired(key="odd")) == []


def test_an_end_that_is_never_heard_of_counts_as_failed() -> None:
    scene = Scene()
    scene.drift()
    (cool,) = scene.hear(TimerFired(key="patience:length"))
    assert cool == StartTimer(key="cool:length", at_s=scene.now_s + 600.0)
    assert not scene.agent.is_retraining("length")


def test_a_swap_that_never_comes_does_not_stop_the_learner() -> None:
    scene = Scene()
    scene.hear(ended(scene.drift(), "better"))
    scene.hear(TimerFired(key="patience:length"))
    scene.hear(TimerFired(key="cool:length"))
    assert len(of(Retrain, scene.outcomes(40, 0.4))) == 1


def test_the_paper_retrains_above_its_threshold_and_clears_the_window() -> None:
    scene = Scene(msgspec.structs.replace(SETTINGS, mode="paper", threshold=0.25))
    (retrain,) = of(Retrain, scene.outcomes(20, 0.3))
    assert isinstance(retrain, Retrain)
    assert scene.hear(ended(retrain, "worse")) == [StopTimer(key="patience:length")]
    assert of(Retrain, scene.outcomes(19, 0.3)) == []
    assert len(of(Retrain, scene.outcomes(1, 0.3))) == 1


def test_the_paper_never_rolls_back() -> None:
    scene = Scene(msgspec.structs.replace(SETTINGS, mode="paper"))
    (retrain,) = of(Retrain, scene.outcomes(20, 0.3))
    assert isinstance(retrain, Retrain)
    scene.hear(ended(retrain, "better"))
    scene.swap("v2", "v1")
    assert of(UsePredictor, scene.outcomes(400, 9.0, version="v2")) == []


def test_off_does_nothing() -> None:
    assert Scene(msgspec.structs.replace(SETTINGS, mode="off")).outcomes(100, 9.0) == []


def test_a_loss_that_is_no_number_is_ignored() -> None:
    scene = Scene()
    for loss in (float("nan"), float("inf"), -1.0):
        assert scene.outcomes(40, loss) == []


WORDS = st.sampled_from(["a", "b", "c", "d"])
MESSAGES = st.one_of(
    st.builds(
        ForecastScored, head=WORDS, version=st.sampled_from(["v1", "v2"]), prompt_class=WORDS, device=WORDS,
        loss=st.floats(0.0, 5.0), covered=st.booleans(),
    ),
    st.builds(
        RetrainEnded, retrain_id=st.sampled_from(["a-1000", "b-2000", "x"]), head=WORDS,
        outcome=st.sampled_from(["better", "worse", "failed"]), version=st.sampled_from(["v1", "v2"]),
        loss_before=st.floats(0.0, 1.0), loss_after=st.floats(0.0, 1.0),
    ),
    st.builds(PredictorReady, head=WORDS, version=st.sampled_from(["v1", "v2"]), previous=st.just("v0")),
    st.builds(TimerFired, key=st.sampled_from(["cool:a", "patience:a", "cool:b", "patience:b", "x"])),
)  # fmt: skip
SMALL = LearnerSettings(window=4, watch=4, most_keys=3, most_heads=2)


@given(st.lists(MESSAGES, max_size=150))
def test_whatever_it_hears_its_memory_is_bounded_and_no_two_retrainings_of_a_head_overlap(
    messages: list[Message],
) -> None:
    agent, twin = LearnerAgent(SMALL), LearnerAgent.from_config(msgspec.to_builtins(SMALL))
    running: dict[str, str] = {}
    for i, message in enumerate(messages):
        answered = list(agent.handle(message, float(i)))
        assert answered == list(twin.handle(message, float(i)))
        if isinstance(message, RetrainEnded) and running.get(message.head) == message.retrain_id:
            del running[message.head]
        if isinstance(message, TimerFired):
            running.pop(message.key.removeprefix("patience:"), None)
        running = {head: retrain_id for head, retrain_id in running.items() if agent.is_retraining(head)}
        for output in answered:
            assert type(output) in LearnerAgent.actions | {AlertRaised}
            if isinstance(output, Retrain):
                assert output.head not in running
                assert output.keys
                running[output.head] = output.retrain_id
        assert len(agent._heads) <= 2
        assert all(len(head.windows) <= 3 for head in agent._heads.values())


class Trainer:
    """A world in which every retraining takes ten seconds and helps."""

    def perform(self, action: Action, now_s: float) -> Iterator[tuple[float, Message]]:
        if isinstance(action, Retrain):
            yield 10.0, ended(action, "better")
        if isinstance(action, UsePredictor):
            yield 0.1, PredictorReady(head=action.head, version=action.version, previous="v1")


def test_a_journal_of_an_episode_replays(tmp_path: Path) -> None:
    agent = LearnerAgent(SETTINGS)
    journal = FileJournal(tmp_path / "j", {agent.name: msgspec.to_builtins(agent.settings)})
    shell = VirtualShell(Switchboard([agent], epoch=1, journal=journal), Trainer())
    for i in range(120):
        version = "v1" if i < 80 else "v2"
        loss = 0.1 if i < 40 or i >= 80 else 0.4
        shell.post(an_outcome(loss, covered=i % 10 != 9, version=version), at_s=float(i))
    shell.run()
    journal.close()
    found = replay(tmp_path / "j")
    assert found.divergence is None
    assert found.steps > 120
