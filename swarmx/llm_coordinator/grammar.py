"""Reads an operator's plain English into an intent, by patterns and names that are known; no model is asked."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

from swarmx.core.control import ControlView, ToolCall
from swarmx.llm_coordinator.intents import (
    Ask,
    Decide,
    HowIsTheModel,
    Intent,
    Order,
    Unclear,
    Unknown,
    WhatChanged,
    WhoScaled,
    WhyCall,
    WhySlow,
    examples,
)
from swarmx.llm_coordinator.phrases import number, resolve, span_s
from swarmx.llm_coordinator.sentences import MANNERS, SENTENCES, THANKS, What
from swarmx.tools.catalogue import PolicyInfo, PolicyKind

Policies = Mapping[PolicyKind, Mapping[str, PolicyInfo]]

_LONGEST = 300  # longer texts are not commands; a model may read them
_SOON_S = 600.0
_ANY = re.IGNORECASE


def parse(text: str, view: ControlView, policies: Policies) -> Intent:
    """What the sentence wants of the cluster in view, with these policies to choose from."""
    sentence = _without_manners(" ".join(re.sub(r"[\"'`“”‘’]s\b", " is", text).split()))
    world = _World(view, policies)
    if sentence and len(sentence) <= _LONGEST:
        for what, pattern in SENTENCES:
            found = pattern.fullmatch(sentence)
            if found and (intent := _BUILD[what](found.groupdict(), world)) is not None:
                return intent
    return Unknown(examples=_nearest(sentence[:_LONGEST], view))


def _nearest(sentence: str, view: ControlView) -> tuple[str, ...]:
    words = sentence.lower()
    return tuple(sorted(examples(view), key=lambda e: SequenceMatcher(None, words, e).ratio(), reverse=True)[:3])


@dataclass(frozen=True, slots=True)
class _World:
    view: ControlView
    policies: Policies

    def model(self, words: str) -> str | Unclear:
        words = re.sub(r"^(?:(?:the|my|our) )?(?:model )?| (?:models?|replicas?|service|fleet)$", "", words, flags=_ANY)
        return _one("model", words, self.view.models)

    def replica(self, words: str) -> str | Unclear:
        words = re.sub(r"^(?:the )?(?:replica )?", "", words, flags=_ANY)
        return _one("replica", words, [r.replica_id for r in self.view.replicas.values() if r.state != "gone"])

    def proposal(self, words: str) -> str | Unclear:
        return _one("proposal", words, [p.proposal_id for p in self.view.proposals])


def _one(what: str, words: str, names: Sequence[str] | Mapping[str, object]) -> str | Unclear:
    found = resolve(words, names)
    if len(found) == 1:
        return found[0]
    if found:
        return Unclear(problem=f"{words!r} may be more than one {what}", choices=found)
    return Unclear(problem=f"there is no {what} like {words!r}", choices=tuple(names))


Found = dict[str, Any]
Build = Callable[[Found, _World], Intent | None]

_ALL = frozenset(
    {"it", "everything", "all", "the cluster", "cluster", "the fleet", "fleet", "things", "the system", "swarmx"}
)


def _order(tool: str, **arguments: Any) -> Order | Unclear:
    """The order, or the first argument that is unclear."""
    unclear = next((value for value in arguments.values() if isinstance(value, Unclear)), None)
    return unclear or Order(call=ToolCall(tool=tool, arguments=arguments))


def _why_slow(found: Found, world: _World) -> Intent | None:
    words = found["model"]
    if words.lower() in _ALL:
        return WhySlow(model=None)
    model = world.model(words)
    return model if isinstance(model, Unclear) else WhySlow(model=model)


def _why_call(found: Found, world: _World) -> Intent | None:
    call_id = found.get("call") or found["call_id"]
    if (words := found.get("replica")) is None:
        return WhyCall(call_id=call_id, replica_id=None)
    words = re.sub(r"^(?:the )?(?:replica )?", "", words, flags=_ANY)
    found_ids = resolve(words, world.view.replicas)  # one that is gone, even long ago, may be asked for
    return WhyCall(call_id=call_id, replica_id=found_ids[0] if len(found_ids) == 1 else words)


def _what_changed(found: Found, world: _World) -> Intent | None:
    if found.get("day"):
        return WhatChanged(window_s=86_400.0)
    return WhatChanged(window_s=span_s(found["span"]) if found.get("span") else _SOON_S)


def _who_scaled(found: Found, world: _World) -> Intent | None:
    model = world.model(found["model"])
    return model if isinstance(model, Unclear) else WhoScaled(model=model)


def _how_is(found: Found, world: _World) -> Intent | None:
    if found["model"].lower() in _ALL:
        return Ask(about="cluster")
    model = world.model(found["model"])
    return model if isinstance(model, Unclear) else HowIsTheModel(model=model)


def _asks(about: Literal["cluster", "running", "proposals", "audit", "help"]) -> Build:
    return lambda found, world: Ask(about=about)


def _scale(found: Found, world: _World) -> Intent | None:
    return _order("scale_model", model=world.model(found["model"]), replicas=number(found["n"]))


def _set_number(found: Found, world: _World) -> Intent | None:
    """`set coder to 3` is an order only if coder is a model; `set w to 3` may be about a parameter."""
    return _scale(found, world) if resolve(found["model"], world.view.models) else None


def _scale_by(sign: int) -> Build:
    def build(found: Found, world: _World) -> Intent | None:
        model = world.model(found["model"])
        if isinstance(model, Unclear):
            return model
        status = world.view.models[model]
        by = number(found["n"]) if found.get("n") else 1
        return _order("scale_model", model=model, replicas=max(0, status.ready + status.starting + sign * by))

    return build


def _bounds(found: Found, world: _World) -> Intent | None:
    low, high = number(found["low"]), number(found["high"])
    return _order("set_replica_bounds", model=world.model(found["model"]), min_replicas=low, max_replicas=high)


def _one_bound(found: Found, world: _World) -> Intent | None:
    model = world.model(found["model"])
    if isinstance(model, Unclear):
        return model
    status, value = world.view.models[model], number(found["n"])
    if status.min_replicas is None or status.max_replicas is None:
        return Unclear(problem=f"{model} has no bounds: SwarmX neither starts nor stops its replicas")
    if found["which"].lower().startswith("min"):
        low, high = value, max(value, status.max_replicas)
    else:
        low, high = min(value, status.min_replicas), value
    return _order("set_replica_bounds", model=model, min_replicas=low, max_replicas=high)


def _drain(found: Found, world: _World) -> Intent | None:
    return _order("drain_replica", replica_id=world.replica(found["replica"]))


def _cordon(cordoned: bool) -> Build:
    return lambda found, world: _order("cordon_replica", replica_id=world.replica(found["replica"]), cordoned=cordoned)


def _policy(kind: PolicyKind) -> Build:
    def build(found: Found, world: _World) -> Intent | None:
        names = world.policies[kind]
        parameters = {}
        for pair in re.findall(r"([\w.]+) ?(?:=|:| to | ) ?(-?\d+(?:\.\d+)?)", found.get("parameters") or ""):
            parameters[pair[0]] = float(pair[1])
        if found.get("parameters") and not parameters:
            return Unclear(problem=f"parameters are written NAME=VALUE, not {found['parameters']!r}")
        return _order(
            f"set_{kind}_policy", policy=_one(f"{kind} policy", found["policy"], names), parameters=parameters
        )

    return build


def _some_policy(found: Found, world: _World) -> Intent | None:
    """`switch to X`: whichever kind knows it."""
    kind: PolicyKind = "scaling" if resolve(found["policy"], world.policies["scaling"]) else "routing"
    return _policy(kind)(found, world)


def _parameter(found: Found, world: _World) -> Intent | None:
    """Of the policies in force only: there is nothing to set on the others."""
    active: dict[PolicyKind, str] = {"routing": world.view.routing.policy, "scaling": world.view.scaling.policy}
    if (words := found.get("policy")) is not None:
        name = _one("policy", words, [name for policies in world.policies.values() for name in policies])
        if isinstance(name, Unclear):
            return name
        if name not in active.values():
            return Unclear(problem=f"{name} is not in force: there is nothing to set", choices=tuple(active.values()))
        active = {kind: policy for kind, policy in active.items() if policy == name}
    known = {kind: world.policies[kind].get(policy) for kind, policy in active.items()}
    kinds = {name: kind for kind, policy in known.items() if policy is not None for name in policy.parameters}
    parameter = _one("parameter of the policies in force", found["parameter"], kinds)
    if isinstance(parameter, Unclear):
        return parameter
    return _order("set_policy_parameter", kind=kinds[parameter], parameter=parameter, value=float(found["value"]))


def _roll_back(found: Found, world: _World) -> Intent | None:
    if found.get("proposal"):
        return _order("rollback", proposal_id=world.proposal(found["proposal"]))
    done = [p for p in world.view.proposals if p.state in ("applied", "kept") and p.applied_at_s is not None]
    if not done:
        return Unclear(problem="no change is in force that could be undone")
    return _order("rollback", proposal_id=max(done, key=lambda p: p.applied_at_s or 0.0).proposal_id)


def _decide(found: Found, world: _World) -> Intent | None:
    yes = found["verb"].lower() in ("approve", "accept", "confirm", "apply", "yes")
    proposal = world.proposal(found["proposal"]) if found.get("proposal") else None
    return Decide(
        decision="approve" if yes else "deny", proposal_id=None if isinstance(proposal, Unclear) else proposal
    )


_BUILD: dict[What, Build] = {
    "bounds": _bounds,
    "one_bound": _one_bound,
    "scale": _scale,
    "set_number": _set_number,
    "scale_up": _scale_by(1),
    "scale_down": _scale_by(-1),
    "cordon": _cordon(True),
    "uncordon": _cordon(False),
    "drain": _drain,
    "routing": _policy("routing"),
    "scaling": _policy("scaling"),
    "policy": _some_policy,
    "parameter": _parameter,
    "roll_back": _roll_back,
    "decide": _decide,
    "why_call": _why_call,
    "why_slow": _why_slow,
    "what_changed": _what_changed,
    "who_scaled": _who_scaled,
    "audit": _asks("audit"),
    "proposals": _asks("proposals"),
    "running": _asks("running"),
    "help": _asks("help"),
    "cluster": _asks("cluster"),
    "how_is": _how_is,
}


def _without_manners(sentence: str) -> str:
    sentence = re.sub(r"[\"`“”]", "", sentence).strip(" ?!.;,:")
    sentence = MANNERS.sub("", sentence, count=1) if MANNERS.match(sentence) else sentence
    return THANKS.sub("", sentence).strip(" ?!.;,:")
