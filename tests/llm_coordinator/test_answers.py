"""Answers: causes come ranked and with their numbers, and nothing is claimed that the view does not show."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from swarmx.core.audit import GENESIS, AuditEntry, AuditRecord, Finding, Head, Report, head_of, seal
from swarmx.core.control import Change, ControlView, Verdict
from swarmx.core.forecast import Forecast
from swarmx.core.nouns import Call, Candidates, Decision
from swarmx.llm_coordinator.answers import Answer, ago, answer, proposal_words, report_words
from swarmx.llm_coordinator.diagnosis import causes
from swarmx.llm_coordinator.intents import (
    Ask,
    Decide,
    HowIsTheModel,
    Unclear,
    Unknown,
    WhatChanged,
    WhoScaled,
    WhyCall,
    WhySlow,
)
from tests.llm_coordinator.views import NOW_S, PERSON, a_model, a_plan, a_proposal, a_replica, a_view, an_alert

REFUSED = Verdict(allowed=False, rule="stale", detail="it is stale")
CALM = {"failed": 0, "in_flight": 2, "waiting": 0, "wait_p95_s": 0.1, "wanted": 2.0, "max_replicas": 4}


def calm(**changes: Any) -> ControlView:
    """A model that is not slow, but for these changes of its figures."""
    return a_view(a_model("coder", **(CALM | changes)))


def said(found: Answer) -> str:
    return "\n".join(found.lines)


def test_a_calm_model_is_not_slow_and_its_numbers_say_so() -> None:
    found = answer(WhySlow(model="coder"), calm())
    assert "coder is not slow by its figures: latency 2 s at P50 and 7.5 s at P95" in said(found)
    assert {(e.metric, e.value, e.window_s) for e in found.evidence} >= {("p95_s", 7.5, 120.0), ("waiting", 0, None)}


@pytest.mark.parametrize(
    ("view", "words", "metric", "value"),
    [
        (calm(ready=0, starting=1), "No replica is ready; 1 starting, which usually takes 30 s", "ready", 0),
        (calm(starting=2), "2 of its replicas are still starting", "starting", 2),
        (calm(wanted=6.0), "It wants 6.0 replicas, and its bounds allow 4", "wanted", 6.0),
        (calm(waiting=12), "12 calls wait in the router now", "waiting", 12),
        (calm(wait_p95_s=5.0), "a call waited 5 s, and took 7.5 s", "wait_p95_s", 5.0),
        (calm(failed=18), "18 of the 180 calls that ended have failed", "failed", 18),
        (calm(cordoned=1), "1 of its replicas are cordoned", "cordoned", 1),
        (calm(in_flight=40), "just busy: each ready replica works on 20.0 calls", "in_flight", 40),
    ],
)
def test_a_cause_is_told_with_its_number(view: ControlView, words: str, metric: str, value: Any) -> None:
    found = answer(WhySlow(model="coder"), view)
    assert words in said(found)
    assert (metric, value) in [(e.metric, e.value) for e in found.evidence]


def test_a_replica_whose_breaker_is_open_is_a_cause_until_it_closes() -> None:
    opened = replace(calm(), alerts=(an_alert("breaker_opened", "coder-1"),))
    assert "coder-1 failed several times in a row" in said(answer(WhySlow(model="coder"), opened))
    closed = replace(opened, alerts=(*opened.alerts, an_alert("breaker_closed", "coder-1", ago_s=1.0)))
    assert causes("coder", closed) == []
    old = replace(calm(), alerts=(an_alert("breaker_opened", "coder-1", ago_s=3600.0),))
    assert causes("coder", old) == []


def test_an_alert_about_another_model_is_no_cause() -> None:
    assert causes("coder", replace(calm(), alerts=(an_alert("breaker_opened", "other-1"),))) == []


def test_a_full_cache_and_an_uneven_load_name_their_replica() -> None:
    full = a_replica("coder-0", "coder", kv_usage=0.97, in_flight=9)
    view = replace(calm(), replicas={"coder-0": full, "coder-1": a_replica("coder-1", "coder", in_flight=1)})
    found = said(answer(WhySlow(model="coder"), view))
    assert "The KV cache of coder-0 is nearly full" in found
    assert "coder-0 has 9 calls, the others 1.0 on average" in found


def test_more_arrivals_than_at_an_earlier_plan_are_a_cause() -> None:
    plan = replace(a_plan("coder", ago_s=90.0, wanted=1.0), terms={"arrivals_per_s": 0.5})
    found = answer(WhySlow(model="coder"), replace(calm(), plans=(plan,)))
    assert "More calls arrive: 1.5/s, against 0.5/s 90 s ago" in said(found)


def test_a_figure_that_is_not_known_is_no_evidence() -> None:
    found = answer(HowIsTheModel(model="coder"), calm(p50_s=None, p95_s=None, wait_p95_s=None))
    assert "no call ended in the last 120 s" in said(found)
    assert all(e.value is not None for e in found.evidence)


def test_the_heaviest_cause_comes_first_and_advice_can_be_typed_in() -> None:
    found = answer(WhySlow(model="coder"), calm(wanted=6.0, waiting=1, in_flight=30, failed=4))
    assert found.lines[1].startswith("1. It wants 6.0")
    assert 'You could say: "set bounds of coder to 1..8".' in found.lines


@given(
    ready=st.integers(0, 4), starting=st.integers(0, 4), waiting=st.integers(0, 99), in_flight=st.integers(0, 99),
    failed=st.integers(0, 180), wanted=st.none() | st.floats(0.0, 20.0), p95=st.none() | st.floats(0.0, 1e4),
    wait=st.none() | st.floats(0.0, 1e4),
)  # fmt: skip
def test_causes_are_ranked_and_each_has_evidence(
    ready: int, starting: int, waiting: int, in_flight: int, failed: int, wanted: float | None, p95: float | None,
    wait: float | None,
) -> None:  # fmt: skip
    figures = {"ready": ready, "starting": starting, "waiting": waiting, "in_flight": in_flight, "failed": failed}
    view = calm(**figures, wanted=wanted, p95_s=p95, p50_s=p95, wait_p95_s=wait)
    found = causes("coder", view)
    weights = [cause.weight for cause in found]
    assert weights == sorted(weights, reverse=True)
    assert all(0.0 < weight <= 1.0 for weight in weights)
    assert all(cause.evidence for cause in found)
    if not ready:
        assert weights[0] == 1.0
    answer(WhySlow(model=None), view)
    answer(HowIsTheModel(model="coder"), view)


def decided() -> Decision:
    call = Call(
        call_id="call-1",
        tenant="red",
        kind="llm",
        model="coder",
        role="r",
        workflow_id="w",
        workflow_kind="k",
        node="n",
        prompt_key="p",
        prompt_bytes=10,
        prompt_tokens=3,
        work_limit=10.0,
    )
    seen = Candidates(
        total=3,
        replica_ids=("coder-0", "coder-1"),
        in_flight=(1, 5),
        remaining_work=(1.0, 9.0),
        context_tokens=(1.0, 2.0),
        signal_age_s=(0.1, 0.1),
        cost_s=(1.5, 4.0),
        terms_s={},
    )
    return Decision(
        call=call,
        attempt=1,
        at_s=NOW_S,
        policy="least_work",
        parameters={},
        replica_id="coder-0",
        runner_up="coder-1",
        forecast=Forecast(levels=(0.5, 0.9), quantiles=(5.0, 9.0), unit="tokens", source="empirical"),
        candidates=seen,
    )


def test_why_a_call_went_there_is_told_with_both_costs() -> None:
    view = replace(calm(), decisions={"call-1": (decided(),)})
    found = answer(WhyCall(call_id="call-1", replica_id="coder-0"), view)
    assert "went to coder-0 by least_work" in said(found)
    costs = [(e.subject, e.value) for e in found.evidence if e.metric == "expected_s"]
    assert costs == [("coder-0", 1.5), ("coder-1", 4.0)]


def test_a_wrong_premise_is_corrected_first() -> None:
    view = replace(calm(), decisions={"call-1": (decided(),)})
    found = answer(WhyCall(call_id="call-1", replica_id="coder-1"), view)
    assert found.lines[0] == "The call did not go to coder-1; it went to coder-0."
    assert found.lines[1] == "It was expected to take 4 s there, against 1.5 s."
    other = answer(WhyCall(call_id="call-1", replica_id="coder-9"), view)
    assert "not among the candidates that were kept" in other.lines[1]


def test_a_call_that_is_not_known_is_said_so() -> None:
    assert "No decision about a call call-9 is known" in said(
        answer(WhyCall(call_id="call-9", replica_id=None), calm())
    )


def recorded(*entries: tuple[float, AuditEntry]) -> list[AuditRecord]:
    """These entries, written so many seconds ago."""
    records: list[AuditRecord] = []
    for seq, (ago_s, entry) in enumerate(entries, start=1):
        prev = records[-1].hash if records else GENESIS
        records.append(seal(entry, seq=seq, at_s=NOW_S - ago_s, prev=prev))
    return records


def scaled(kind: Any, **changes: Any) -> AuditEntry:
    values: dict[str, Any] = {"arguments": {"model": "coder", "replicas": 3}, "tool": "scale_model", "via": "cli"}
    values["changes"] = (Change(subject="coder", what="replicas", before=1, after=3),)
    return AuditEntry(kind=kind, actor=PERSON, **(values | changes))


def test_what_changed_pairs_intents_with_outcomes_newest_first() -> None:
    records = recorded(
        (5000.0, scaled("intent", tool="drain_replica", arguments={"replica_id": "coder-0"})),
        (300.0, scaled("intent")),
        (290.0, scaled("outcome", intent_seq=2, outcome="applied")),
        (100.0, scaled("intent", tool="cordon_replica", arguments={"replica_id": "coder-1"})),
        (50.0, scaled("note", outcome="refused", tool="rollback", arguments={}, verdict=REFUSED)),
    )
    found = answer(WhatChanged(window_s=600.0), calm(), records=records)
    assert found.lines[0] == "In the last 10 minutes, newest first:"
    assert found.lines[1].startswith("50 s ago: ada (operator, by cli) rollback()")
    assert found.lines[1].endswith(": refused (it is stale)")
    assert found.lines[2].endswith(": under way")
    assert found.lines[3] == (
        "5 min ago: ada (operator, by cli) scale_model(model=coder, replicas=3) coder: replicas 1 → 3: applied"
    )
    assert len(found.lines) == 4


def test_a_quiet_time_is_said_to_be_one() -> None:
    found = answer(WhatChanged(window_s=600.0), calm(), records=recorded((700.0, scaled("intent"))))
    assert said(found) == "Nothing changed in the last 10 minutes, and there was no alert."


def test_alerts_belong_to_what_changed() -> None:
    view = replace(calm(), alerts=(an_alert("at_max", "coder", ago_s=30.0),))
    assert "30 s ago: alert at_max about coder" in answer(WhatChanged(window_s=60.0), view).lines


def test_many_changes_are_cut_and_counted() -> None:
    found = answer(WhatChanged(window_s=600.0), calm(), records=recorded(*[(5.0, scaled("intent"))] * 30))
    assert found.lines[-1] == "and 10 more."
    assert len(found.lines) == 22


def test_who_scaled_a_model_tells_people_and_plans_and_nobody_elses() -> None:
    plan = replace(a_plan("coder", ago_s=30.0, wanted=2.4), deploys=("coder-2",), reason="grow", terms={"load": 1.2})
    records = recorded(
        (60.0, scaled("intent")),
        (59.0, scaled("outcome", intent_seq=1, outcome="kept")),
        (40.0, scaled("intent", tool="deploy", arguments={"replica_id": "coder-7"}, changes=())),
        (20.0, AuditEntry(kind="note", actor=PERSON, via="rest", tool="scale_model", arguments={"model": "other"})),
    )
    found = said(answer(WhoScaled(model="coder"), replace(calm(), plans=(plan,)), records=records))
    assert "ada (operator, by cli) scale_model" in found
    assert "coder-7" in found
    assert "the scaler (target_tracking, grow) started coder-2: it had 2 and wanted 2.40" in found
    assert "other" not in found
    assert "Nobody changed" in said(answer(WhoScaled(model="coder"), calm()))


def test_a_replica_that_is_gone_belongs_to_the_longest_name_of_a_model_that_it_begins_with() -> None:
    view = a_view(a_model("coder"), a_model("coder-large"))
    records = recorded((40.0, scaled("intent", tool="drain", arguments={"replica_id": "coder-large-7"}, changes=())))
    assert "coder-large-7" in said(answer(WhoScaled(model="coder-large"), view, records=records))
    assert "coder-large-7" not in said(answer(WhoScaled(model="coder"), view, records=records))


def test_the_cluster_is_told_model_by_model() -> None:
    view = replace(calm(), alerts=(an_alert("at_max", "coder"),), proposals=(a_proposal("no_op", "open"),))
    found = said(answer(Ask(about="cluster"), view))
    assert "2 replicas of 1 models are ready; 3 workflows are running; workflow P95 is 21.5 s" in found
    assert "coder: 2 ready (bounds 1..4 of 8, 2.0 wanted); 2 in flight" in found
    assert "Alert 5 s ago: at_max about coder" in found
    assert "1 proposals wait for a decision." in found
    assert said(answer(Ask(about="cluster"), replace(calm(), models={}))) == "There is no model here yet."


def test_an_emulated_replica_is_called_so() -> None:
    assert "coder-0: ready, 2 in flight, 50% busy, emulated" in said(answer(HowIsTheModel(model="coder"), calm()))


def test_open_proposals_come_with_their_changes_and_how_to_decide() -> None:
    waiting = a_proposal("scale_model", "open", proposal_id="pr-1", model="coder", replicas=3)
    change = Change(subject="coder", what="replicas", before=1, after=3)
    waiting = replace(waiting, diff=replace(waiting.diff, changes=(change,)))
    view = replace(calm(), proposals=(waiting, a_proposal("no_op", "denied", proposal_id="pr-2")))
    found = answer(Ask(about="proposals"), view)
    assert found.lines[1:3] == proposal_words(waiting)
    assert found.lines[2] == "  coder: replicas 1 → 3"
    assert "swarmx proposals approve" in found.lines[-1]
    assert "pr-2" not in said(found)
    assert said(answer(Ask(about="proposals"), calm())) == "No proposal waits for a decision."


def test_what_is_running_is_told_by_replica() -> None:
    found = answer(Ask(about="running"), calm())
    assert found.lines[:2] == ("3 workflows are running, with 4 calls at replicas.", "  coder-0: 2 calls")


def test_a_decision_is_only_told_how_to_take() -> None:
    named = answer(Decide(decision="deny", proposal_id="pr-1"), calm())
    assert "`swarmx proposals deny pr-1`" in said(named)
    assert "None is open now." in said(answer(Decide(decision="approve", proposal_id=None), calm()))


def test_what_is_unclear_or_unknown_is_told_with_choices() -> None:
    unclear = answer(Unclear(problem="'q' may be more than one model", choices=("qa", "qb")), calm())
    assert said(unclear) == "I am not sure what you mean: 'q' may be more than one model. Which one: qa, qb?"
    assert "  status" in answer(Unknown(examples=("status",)), calm()).lines
    assert "  why is coder slow?" in answer(Ask(about="help"), calm()).lines


def test_the_verdict_on_the_audit_log_is_told_in_words() -> None:
    (record,) = recorded((5.0, scaled("intent")))
    head = head_of(record)
    fine = Report(records=1, last=head, head=head, open_intents=(record,), findings=())
    assert report_words(fine)[0].startswith("The audit log is intact: 1 records")
    assert "the head kept of record 1 confirms it" in report_words(fine)[0]
    assert report_words(fine)[1] == "1 actions have no outcome yet: 1 (scale_model by ada)."
    empty = Head(seq=0, hash=GENESIS, at_s=0.0)
    new = Report(records=0, last=empty, head=empty, open_intents=(), findings=())
    assert report_words(new) == ("The audit log is intact: it is empty.",)
    cut = Finding(verdict="tail_cut", seq=7, detail="record 9 is missing")
    bad = Report(records=7, last=empty, head=None, open_intents=(), findings=(cut,))
    assert "NOT as it was written" in report_words(bad)[0]
    assert report_words(bad)[1] == "Record 7: tail_cut: record 9 is missing"
    torn = Report(records=7, last=empty, head=None, open_intents=(), findings=(replace(cut, verdict="torn"),))
    assert report_words(torn)[0].startswith("The audit log is intact")
    assert answer(Ask(about="audit"), calm(), chain=report_words(bad)).lines == report_words(bad)


@pytest.mark.parametrize(
    ("seconds", "words"), [(-1.0, "0 s ago"), (59.0, "59 s ago"), (300.0, "5 min ago"), (7200.0, "2 h ago")]
)
def test_how_long_ago_is_told_in_one_unit(seconds: float, words: str) -> None:
    assert ago(seconds) == words
