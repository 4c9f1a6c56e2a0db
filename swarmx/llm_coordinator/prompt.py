"""What a language model is asked: two templates filled with numbers, words of our own and aliases, and the tools."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import jinja2
import msgspec

from swarmx.core.control import Episode, PolicyStatus, Prompt, ProposalState, Scalar, ToolCall
from swarmx.core.errors import ConfigError
from swarmx.llm_coordinator.aliases import ELSEWHERE, NAMED, Aliases, Kind
from swarmx.llm_coordinator.situation import Situation, Trigger
from swarmx.tools.catalogue import Catalogue
from swarmx.tools.schema import schema_of
from swarmx.tools.tool import Names, Tool

REASON = "reason"  # in the schema of every tool, and no argument of any
MAX_TOKENS = 200
_OUTCOMES = frozenset({"pending", "no_op", "observed", "refused", *get_args(ProposalState)})
_SYSTEM = "coordinator.system.md.j2"
_USER = "coordinator.user.md.j2"


# An alert is answered by the tools that can answer it: a small model is not led astray, and has less to read.
_ANSWERS: Mapping[Trigger, frozenset[str]] = {
    "at_max": frozenset({"set_replica_bounds", "scale_model"}),
    "breaker_opened": frozenset({"cordon_replica", "drain_replica"}),
    "replica_failed": frozenset({"cordon_replica", "drain_replica", "set_replica_bounds"}),
    "policy_failed": frozenset({"set_routing_policy", "set_scaling_policy"}),
}
_ALWAYS = frozenset({"no_op", "rollback"})


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """What the built-in rules would do, in numbers, words of our own and aliases."""

    tool: str
    arguments: dict[str, Scalar]


class Recalled(msgspec.Struct, frozen=True, kw_only=True):
    """An earlier turn in a similar situation, as it may be shown: what was done in numbers and words, how it ended."""

    similarity: float
    tool: str
    arguments: dict[str, Scalar]
    outcome: str
    objective_before: float | None
    objective_after: float | None


class Prompts:
    """The templates of a folder, read when this is made. Raises ConfigError for a folder without them."""

    def __init__(self, folder: Path) -> None:
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(folder),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            autoescape=False,  # noqa: S701 - the result is read by a model, and no text of the outside is put in
        )
        environment.filters |= {"number": _number, "policy": _policy, "arguments": _arguments}
        try:
            self._system = environment.get_template(_SYSTEM)
            self._user = environment.get_template(_USER)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the prompts of the coordinator cannot be read from {folder}: {error!r}.") from None

    def render(
        self,
        situation: Situation,
        nearest: Sequence[Recalled],
        schemas: Sequence[dict[str, Any]],
        advice: Advice,
        *,
        problem: str = "",
    ) -> Prompt:
        """The prompt of one turn; `problem` says, in words of our own, why the answer before could not be used."""
        return Prompt(
            system=self._system.render(),
            user=self._user.render(now=situation, nearest=nearest, advice=advice, problem=problem),
            tools=tuple(schemas),
            max_tokens=MAX_TOKENS,
        )


def templates_folder() -> Path:
    """Where the templates are: inside the installed package, or beside it in a checkout."""
    package = Path(str(files("swarmx")))
    for folder in (package / "_prompts", package.parent / "prompts"):
        if (folder / _SYSTEM).is_file():
            return folder
    raise ConfigError(f"the prompts of the coordinator are neither in {package} nor beside it; install SwarmX again.")


def schemas_of(tools: Iterable[Tool], catalogue: Catalogue) -> list[dict[str, Any]]:
    """The schemas of the tools, over all policies and parameters: words of our own, the same in every turn."""
    policies = catalogue.policies
    names: dict[Names, list[str]] = {
        "routing_policy": list(policies["routing"]),
        "scaling_policy": list(policies["scaling"]),
        "parameter": sorted({name for kind in policies.values() for one in kind.values() for name in one.parameters}),
    }
    return [schema_of(tool, names) for tool in tools]


def offered(schemas: Iterable[dict[str, Any]], situation: Situation) -> tuple[dict[str, Any], ...]:
    """The schemas of the tools, narrowed to what makes sense now; a tool that has no subject now is left out.

    An alert is answered by the tools that can answer it; all are there when it is time to look around. Only models
    with bounds can be scaled, only parameters of the policies in force can be moved, only another policy can be set,
    and only a change that is in force can be rolled back. What a reason is stands in the template, once.
    """
    answers = _ANSWERS.get(situation.trigger)
    subjects: Mapping[Kind, list[str]] = {
        "model": [m.alias for m in situation.models if m.limit is not None],
        "replica": [r.alias for r in situation.replicas],
        "proposal": [c.alias for c in situation.changes if c.state in ("applied", "kept")],
    }
    choices = {argument: subjects[kind] for argument, kind in NAMED.items()}
    choices["parameter"] = [*situation.routing.parameters, *situation.scaling.parameters]
    usable: list[dict[str, Any]] = []
    for schema in schemas:
        function = schema["function"]
        if answers is not None and function["name"] not in answers | _ALWAYS:
            continue
        parameters = function["parameters"]
        narrowed = {name: choices[name] for name in parameters["properties"] if name in choices}
        for status, setter in ((situation.routing, "set_routing_policy"), (situation.scaling, "set_scaling_policy")):
            if function["name"] == setter:
                known = parameters["properties"]["policy"]["enum"]
                narrowed["policy"] = [policy for policy in known if policy != status.policy]
        if all(narrowed.values()):
            properties = parameters["properties"] | {
                name: {"type": "string", "enum": known} for name, known in narrowed.items()
            }
            properties[REASON] = {key: value for key, value in properties[REASON].items() if key != "description"}
            parameters = parameters | {"properties": properties}
            usable.append(schema | {"function": function | {"parameters": parameters}})
    return tuple(usable)


def advised(call: ToolCall, aliases: Aliases, words: Collection[str]) -> Advice:
    """The rules' choice as it may be shown."""
    return Advice(tool=call.tool, arguments=aliases.shown(call.arguments, words))


def recalled(episode: Episode, similarity: float, aliases: Aliases, words: Collection[str]) -> Recalled:
    """An episode without anything that a model or a client once wrote."""
    outcome = episode.outcome.partition(":")[0]  # after the colon: the rule that refused
    return Recalled(
        similarity=similarity,
        tool=episode.call.tool if episode.call.tool in words else ELSEWHERE,
        arguments=aliases.shown(episode.call.arguments, words),
        outcome=outcome if outcome in _OUTCOMES else ELSEWHERE,
        objective_before=episode.objective_before,
        objective_after=episode.objective_after,
    )


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _policy(status: PolicyStatus) -> str:
    return f"{status.policy}({_arguments(status.parameters)})" if status.parameters else status.policy


def _arguments(arguments: Mapping[str, Scalar]) -> str:
    return ", ".join(f"{key}={_scalar(value)}" for key, value in arguments.items())


def _scalar(value: Scalar) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return value
        case _:
            return _number(value)
