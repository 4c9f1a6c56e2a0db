"""What a call is charged to its tenant: what it is expected to need at first, what it came to in the end."""

from __future__ import annotations

from swarmx.agents.budgets import Budgets, OverBudget
from swarmx.agents.calls import CallState, WaitingCalls
from swarmx.agents.router_settings import RouterSettings, TenantSettings
from swarmx.agents.shares import Shares
from swarmx.core.messages import CallFinished
from swarmx.core.nouns import Call

_ANYBODY = TenantSettings()


class Accounts:
    """Two accounts of each tenant: its share of the service of each model, and its budget of tokens.

    The share is charged for each attempt, when it is sent. The budget is charged once for the call, when it is
    accepted; images have no tokens.

    A call that ends without a whole answer counts for its prompt and for what was streamed. Where nothing was streamed,
    it costs no budget if it failed, and what was expected if its client left: the engine has worked for it. In the
    share, an attempt that failed always counts for its prompt, or calls that fail would always be next.
    """

    def __init__(self, settings: RouterSettings) -> None:
        self._tenants = settings.tenants
        self._weights = {name: tenant.weight for name, tenant in settings.tenants.items()}
        self._prompt_weight, self._output_weight = settings.prompt_token_weight, settings.output_token_weight
        self._budgets = Budgets(settings.tenants)

    def shares(self) -> Shares:
        """The shares of a model that nobody was served by yet."""
        return Shares(self._weights, prompt_token_weight=self._prompt_weight, output_token_weight=self._output_weight)

    def priority(self, call: Call) -> int:
        """The priority of the call, which is what it asks for up to what its tenant may have."""
        return min(call.priority, self._tenants.get(call.tenant, _ANYBODY).priority)

    def accept(self, state: CallState, now_s: float) -> OverBudget | None:
        """Take what the call is expected to need from the budget of its tenant, unless there is not enough."""
        if state.call.tenant not in self._budgets or state.call.kind != "llm":
            return None
        tokens = state.call.prompt_tokens + state.forecast.mean
        refused = self._budgets.take(state.call.tenant, tokens, now_s, state.call.call_id)
        if refused is None:
            state.budgeted = tokens
        return refused

    def sent(self, state: CallState, waiting: WaitingCalls, cached_tokens: float) -> None:
        """An attempt begins at a replica that holds so much of the prompt."""
        uncached = max(0.0, state.call.prompt_tokens - cached_tokens)
        state.charged = waiting.shares.weighed(uncached, state.forecast.mean)
        waiting.serve(state, state.charged)

    def finished(self, state: CallState, waiting: WaitingCalls, message: CallFinished, now_s: float) -> None:
        """The attempt was answered in full."""
        prompt = message.prompt_tokens or state.call.prompt_tokens
        uncached = max(0, prompt - message.cached_tokens)
        self._correct(state, waiting, waiting.shares.weighed(uncached, message.work_done))
        self._close(state, prompt + message.work_done, now_s)

    def failed(self, state: CallState, waiting: WaitingCalls) -> None:
        """The attempt failed; another may follow."""
        self._correct(state, waiting, waiting.shares.weighed(state.call.prompt_tokens, state.work_done))

    def given_up(self, state: CallState, now_s: float) -> None:
        """The call was refused, after what it has streamed."""
        self._close(state, state.call.prompt_tokens + state.work_done if state.streamed else 0.0, now_s)

    def cancelled(self, state: CallState, waiting: WaitingCalls, now_s: float, *, at_replica: bool) -> None:
        """The client has left."""
        if at_replica and not state.streamed:
            return
        if at_replica:
            self.failed(state, waiting)
        self.given_up(state, now_s)

    def _correct(self, state: CallState, waiting: WaitingCalls, tokens: float) -> None:
        waiting.shares.correct(state.call.tenant, tokens - state.charged)
        state.charged = 0.0

    def _close(self, state: CallState, tokens: float, now_s: float) -> None:
        if state.budgeted:
            self._budgets.correct(state.call.tenant, tokens - state.budgeted, now_s)
            state.budgeted = 0.0
