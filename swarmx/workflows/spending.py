"""Budgets: what a call may use up at most, what it did use up, and whether there is that much left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgspec

from swarmx.workflows.events import NodeFailed, NodeStarted, Spent
from swarmx.workflows.nodes import Budget, UseNode
from swarmx.workflows.state import NodeRun, Run
from swarmx.workflows.work import Start, StartModelCall

BYTES_PER_TOKEN = 4.0
_ROUNDING = 1e-9  # sums of money are sums of floating-point numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a model costs: a million tokens of prompts and of answers, and an image."""

    input_per_million: float = 0.0
    output_per_million: float = 0.0
    per_image: float = 0.0

    def of(self, prompt_tokens: int, output_tokens: int, images: int = 0) -> float:
        tokens = prompt_tokens * self.input_per_million + output_tokens * self.output_per_million
        return tokens / 1e6 + images * self.per_image


Prices = Mapping[str, Price]
"""By the model's name; a model that is not there costs nothing."""

NO_PRICES: Prices = MappingProxyType({})
_FREE = Price()


def most_of(call: Start, prices: Prices) -> Spent:
    """What an attempt may use up at most. A prompt counts as its estimate; how long it takes, nobody knows before."""
    if not isinstance(call, StartModelCall):
        return Spent(steps=1)
    price = prices.get(call.model, _FREE)
    if call.kind == "image":
        return Spent(steps=1, money=price.of(0, 0, call.body["n"]))
    prompt_tokens = prompt_estimate(call.body)
    output_tokens: int = call.body["max_tokens"]
    money = price.of(prompt_tokens, output_tokens)
    return Spent(steps=1, prompt_tokens=prompt_tokens, output_tokens=output_tokens, money=money)


def prompt_estimate(body: Mapping[str, Any]) -> int:
    """Tokens of a chat request's messages and tools, from their bytes."""
    told = msgspec.json.encode([body["messages"], body.get("tools", [])])
    return max(1, int(len(told) / BYTES_PER_TOKEN))


def used(
    model: str, prices: Prices, *, prompt_tokens: int, output_tokens: int, images: int = 0, replica_s: float = 0.0
) -> Spent:
    """What an attempt used up, by the prices of now."""
    return Spent(
        steps=1,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        money=prices.get(model, _FREE).of(prompt_tokens, output_tokens, images),
        replica_s=replica_s,
    )


def bounded(run: Run, path: str) -> bool:
    """Whether a call of the node counts against some budget: its own, one around it, or that of the whole run."""
    around = (run.nodes[account].step.node if account else run.graph.spec for account in run.accounts(path))
    return any(getattr(node, "budget", None) is not None for node in around)


def admission(run: Run, call: Start, prices: Prices) -> NodeStarted | NodeFailed:
    """What is to be recorded about a call that is to be made: its start, or that no budget has enough left for it."""
    if not bounded(run, call.path):
        return call.started
    most = most_of(call, prices)
    refused = refusal(run, call.path, most)
    if refused is not None:
        return NodeFailed(path=call.path, error=refused, reason="budget")
    return msgspec.structs.replace(call.started, reserved=most)


def refusal(run: Run, path: str, most: Spent) -> str | None:
    """Why another call of the node may not start: a budget that it could go beyond; None if there is enough left.

    What a tool of an agent does leaves the agent enough for an answer.
    """
    beside = ""
    for account in run.accounts(path):
        node = run.nodes[account].step.node if account else run.graph.spec
        if isinstance(node, UseNode) and (answer := _answer(run, run.nodes[account])) is not None:
            most, beside = most + answer, ", with the answer that its agent is still to give"
        budget: Budget | None = getattr(node, "budget", None)
        if budget is None:
            continue
        spent, reserved = run.ledger.spent_by(account), run.ledger.reserved_by(account)
        for what, has, out, more in (
            ("tokens", spent.tokens, reserved.tokens, most.tokens),
            ("steps", spent.steps, reserved.steps, most.steps),
            ("money", spent.money, reserved.money, most.money),
            ("replica_s", spent.replica_s, reserved.replica_s, most.replica_s),
        ):
            allowed = getattr(budget, what)
            if allowed is None:
                continue
            none_left = what == "replica_s" and has >= allowed  # what a call takes is not known before
            if none_left or has + out + more > allowed * (1.0 + _ROUNDING):
                whose = f"of {account}" if account else "of the workflow"
                return (
                    f"the budget {whose} allows {_number(allowed)} {what}; {_number(has)} are spent, {_number(out)} "
                    f"may be by calls that are out, and this one could take {_number(more)}{beside}"
                )
    return None


def _answer(run: Run, use: NodeRun) -> Spent | None:
    """What the agent of this tool needs at least to answer; None after its last step.

    The prompt for that has the last one in it, and what the model said to it.
    """
    path = use.scope.owner or ""
    agent, so_far = run.nodes[path], run.ledger.spent_by(path)
    if agent.turns[-1].last:
        return None
    prompt_tokens = sum(agent.turns[-1].usage.values())
    output_tokens: int = getattr(agent.step.node, "max_tokens", 0)
    return Spent(
        steps=1,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        money=so_far.money * (prompt_tokens + output_tokens) / max(1, so_far.tokens),
    )


def _number(value: float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
