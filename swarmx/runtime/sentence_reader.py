"""Has a language model turn an operator's sentence into one tool call, where the patterns do not know it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from swarmx.core.audit import ModelUse
from swarmx.core.control import ControlView, Prompt, ToolCall
from swarmx.core.errors import ConfigError
from swarmx.core.ports import LanguageModel
from swarmx.llm_coordinator.aliases import NAMED, Aliases
from swarmx.llm_coordinator.intents import Ask, HowIsTheModel, Intent, Order, WhyCall
from swarmx.llm_coordinator.prompt import MAX_TOKENS
from swarmx.llm_coordinator.reply import Parsed, read_reply
from swarmx.runtime.chooser import ask, use_of
from swarmx.tools.catalogue import Catalogue
from swarmx.tools.registry import Registry
from swarmx.tools.schema import schema_of
from swarmx.tools.tool import Names

_TEMPLATE = "console.system.md.j2"
_MOST_NAMES = 50


class SentenceReader:
    """The prompt holds the operator's sentence and the names of models, replicas and proposals; nothing of tenants.

    Raises ConfigError when the template is not in the folder.
    """

    def __init__(
        self, *, model: LanguageModel, registry: Registry, catalogue: Catalogue, templates: Path, deadline_s: float
    ) -> None:
        self._model = model
        self._registry = registry
        self._policies: dict[Names, list[str]] = {
            "routing_policy": list(catalogue.policies["routing"]),
            "scaling_policy": list(catalogue.policies["scaling"]),
        }
        self._deadline_s = deadline_s
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(templates),
            undefined=jinja2.StrictUndefined,
            autoescape=False,  # noqa: S701 - a model reads the result
        )
        try:
            self._template = environment.get_template(_TEMPLATE)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the prompt of the console cannot be read from {templates}: {error!r}.") from None

    async def read(self, sentence: str, view: ControlView) -> tuple[Intent, ModelUse] | None:
        """What the model took the sentence for; None when it gave nothing that can be used."""
        models = list(view.models)[:_MOST_NAMES]
        replicas = [r.replica_id for r in view.replicas.values() if r.state != "gone"][:_MOST_NAMES]
        proposals = [p.proposal_id for p in view.proposals if p.state in ("applied", "kept")][-_MOST_NAMES:]
        parameters = [*view.routing.parameters, *view.scaling.parameters]
        names: dict[Names, list[str]] = {"model": models, "replica": replicas, "proposal": proposals}
        names |= {**self._policies, "parameter": parameters}
        tools = self._registry.tools
        schemas = [schema for tool in tools.values() if _has_subject(schema := schema_of(tool, names))]
        prompt = Prompt(
            system=self._template.render(models=models, replicas=replicas, proposals=proposals),
            user=sentence,
            tools=tuple(schemas),
            max_tokens=MAX_TOKENS,
        )
        reply = await ask(self._model, prompt, deadline_s=self._deadline_s)
        # People here call things by their real names, which stand for themselves.
        itself = Aliases(
            model={name: name for name in models},
            replica={name: name for name in replicas},
            proposal={name: name for name in proposals},
        )
        read = read_reply(reply, tools, itself, schemas)
        if not isinstance(read, Parsed):
            return None
        intent = _meant(read.call, view)
        return None if intent is None else (intent, use_of(self._model.name, prompt, reply))


def _has_subject(schema: dict[str, Any]) -> bool:
    """Whether there is something that the tool could be used on: a name out of thin air is not taken."""
    properties = schema["function"]["parameters"]["properties"]
    return all("enum" in properties[name] for name in properties if name in NAMED or name == "parameter")


def _meant(call: ToolCall, view: ControlView) -> Intent | None:
    match call.tool:
        case "inspect_cluster":
            return Ask(about="cluster")
        case "inspect_model" if call.arguments["model"] in view.models:
            return HowIsTheModel(model=call.arguments["model"])
        case "why_decision":
            return WhyCall(call_id=call.arguments["call_id"], replica_id=None)
        case "inspect_model" | "no_op":
            return None
        case _:
            return Order(call=call)
