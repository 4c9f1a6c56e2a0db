"""The sentences that are understood, as patterns: `<model>` is captured, `<THE>` stands for words below."""

from __future__ import annotations

import re
from typing import Literal

from swarmx.llm_coordinator.phrases import NUMBER, SPAN

What = Literal[
    "bounds", "one_bound", "scale", "set_number", "scale_up", "scale_down", "cordon", "uncordon", "drain",
    "routing", "scaling", "policy", "parameter", "roll_back", "decide", "why_call", "why_slow", "what_changed",
    "who_scaled", "audit", "proposals", "running", "help", "cluster", "how_is",
]  # fmt: skip

_CAPTURED = {
    **dict.fromkeys(("model", "replica", "policy"), r"\S+(?: \S+){0,3}?"),
    **dict.fromkeys(("n", "low", "high"), NUMBER),
    **dict.fromkeys(("call", "proposal"), r"[\w.:-]+"),
    "call_id": r"call[_-]\S+",
    "parameter": r"[\w-]+",
    "value": r"-?\d+(?:\.\d+)?",
    "span": SPAN,
    "day": "today",
    "which": "min|max",
    "verb": "approve|accept|confirm|apply|yes|deny|reject|decline|refuse|no",
    "parameters": ".+",
}
_WORDS = {
    "REPLICAS": "(?: replicas?| instances?| copies)?",
    "THE": "(?: the)?",
    "SHOW": "(?:(?:show|list|give|get|view|see) )?(?:me )?(?:all )?(?:the )?",
    "SET": "(?:(?:set|change|switch|make) )?(?:the )?",
    "SCALE": "(?:scale|resize|size|grow|shrink|bring|increase|decrease|reduce|raise|lower|change)",
    "UP": "(?: up| down| out| in)?",
    "WITH": "(?:,? (?:with|and|using) <parameters>)?",
    "TO": r"(?: ?\.\.+ ?| ?- ?| to | and |, )",
    "HAVE": "(?: is| are| was| were| has| have| had| did| does| do)?",
    "SENT": "(?:go|went|gone|end up|land|run|put|(?:(?:get|been) )?(?:sent|routed|dispatched|placed|given|assigned))",
    "WHERE": "(?: there| (?:to|on|at|with) <replica>)?",
    "ABOUT": "(?: decision)?(?: (?:about|on|for))?",
    "SO": "(?: is| are| was| been| being| running| responding| getting| so| that| very| too| this| really| now| all)*",
    "SLOW": (
        "(?:slow|slower|sluggish|laggy|lagging|late|behind|overloaded|stuck|unresponsive|backed up|queue?ing|failing|"
        "hanging|bad|red|delayed|down|tak(?:ing|es?) (?:so |that |too |very )?(?:long|forever|ages))"
    ),
    "LAST": "(?: (?:in|of|over|during|within|for|from|since|the|last|past|previous))*(?: <span>)?(?: ago)?(?: <day>)?",
    "SCALED": "(?:scaled?|changed?|resized?|sized|grow|grew|grown|shrink|shrank|shrunk|deployed|drained)",
    "ALL": "(?:cluster|fleet|queues?|system|swarm|swarmx|everything|things|all|replicas|models|it|services?)",
    "STATE": "(?:status|state|health|overview|summary|figures|numbers|load)",
    "FINE": (
        "(?:intact|ok|okay|fine|valid|complete|broken|sound|good|tampered with|unbroken|clean|consistent|healthy|well)"
    ),
}

_ORDERS: tuple[tuple[What, str], ...] = (
    ("bounds", r"<SET>(?:replica )?(?:bounds|limits|range) (?:of|for|on) <model>(?: to|:|=| between| from)* <low>"
     r"<TO><high><REPLICAS>"),
    ("bounds", r"(?:keep|bound|limit|hold|restrict|scale) <model>(?: to| between| within| from)* <low><TO><high>"
     r"<REPLICAS>"),
    ("bounds", r"(?:(?:set|bound|limit|keep|give) )?<model>(?: to| at)? min(?:imum)?(?: of)? ?=?<low>,?(?: and)? max"
     r"(?:imum)?(?: of)? ?=?<high>"),
    ("one_bound", r"<SET><which>(?:imum)?(?: number of)?<REPLICAS> (?:of|for|on) <model>(?: to| at|:|=)* <n>"
     r"<REPLICAS>"),
    ("scale", r"<SCALE><UP> <model><UP> to <n><REPLICAS>"),
    ("scale", r"give <model> <n><REPLICAS>"),
    ("scale", r"run <n><REPLICAS> of <model>"),
    ("set_number", r"set <model> to <n><REPLICAS>"),
    ("scale_up", r"(?:grow|scale (?:up|out)) <model>(?: by <n><REPLICAS>)?"),
    ("scale_up", r"scale <model> (?:up|out)(?: by <n><REPLICAS>)?"),
    ("scale_up", r"(?:add|start) (?:an?(?:other)?|<n>)(?: more)?<REPLICAS> (?:to|for|of) <model>"),
    ("scale_down", r"(?:shrink|scale (?:down|in)) <model>(?: by <n><REPLICAS>)?"),
    ("scale_down", r"scale <model> (?:down|in)(?: by <n><REPLICAS>)?"),
    ("scale_down", r"(?:remove|take|stop) (?:an?|<n>)<REPLICAS> (?:of|from) <model>"),
    ("uncordon", r"(?:un-?cordon|resume|re-?enable) <replica>"),
    ("uncordon", r"(?:put|take|bring) <replica> back(?: in(?:to)?)?(?: rotation| service)?"),
    ("cordon", r"(?:cordon|pause|disable)(?: off)? <replica>"),
    ("cordon", r"(?:take|remove) <replica> (?:out of|from) (?:rotation|service)"),
    ("cordon", r"stop (?:sending|routing)(?: \w+)? to <replica>"),
    ("drain", r"(?:drain|retire|decommission|evict|shut down|stop|remove) <replica>"),
    ("routing", r"(?:route|dispatch)(?: calls| traffic| everything)? (?:by|with|using|through|via) <policy><WITH>"),
    ("routing", r"<SET>routing(?: policy)?(?: to| =|:)? <policy><WITH>"),
    ("routing", r"(?:use|switch to) <policy> (?:for|as)<THE> routing(?: policy)?"),
    ("scaling", r"scale(?: models| everything)? (?:by|with|using) <policy><WITH>"),
    ("scaling", r"<SET>scaling(?: policy)?(?: to| =|:)? <policy><WITH>"),
    ("scaling", r"(?:use|switch to) <policy> (?:for|as)<THE> scaling(?: policy)?"),
    ("policy", r"(?:use|switch to)<THE> <policy>(?: policy)?<WITH>"),
    ("parameter", r"<SET>(?:parameter )?<parameter> (?:of|for|in|on) <policy> (?:to|=) <value>"),
    ("parameter", r"(?:set|change) (?:the )?(?:parameter )?<parameter> ?(?:to|=) ?<value>"),
    ("roll_back", r"(?:roll ?back|undo|revert|take back)(?: (?:it|that|this)| (?:the |my )?la(?:st|test)(?: "
     r"(?:change|proposal|one|order))?)?"),
    ("roll_back", r"(?:roll ?back|undo|revert|take back)<THE>(?: (?:proposal|change))? <proposal>"),
    ("decide", r"<verb>(?: to)?(?: (?:it|that|this|the))?(?: proposal)?(?: <proposal>)?"),
)  # fmt: skip

_QUESTIONS: tuple[tuple[What, str], ...] = (
    ("why_call", r"why<HAVE><THE> call <call>(?: <SENT><WHERE>)?"),
    ("why_call", r"why<HAVE> <call> <SENT><WHERE>"),
    ("why_call", r"why<HAVE> <call_id>"),
    ("why_call", r"(?:explain|where did)<THE><ABOUT> call <call>(?: go)?"),
    ("why_call", r"(?:explain|show|where did)<THE><ABOUT> <call_id>(?: go)?"),
    ("what_changed", r"what(?: else)?<HAVE>(?: been)?(?: (?:anyone|anybody|you))? "
     r"(?:changed?|happened|happen|done|new|different)(?: lately| recently)?<LAST>"),
    ("what_changed", r"<SHOW>(?:any )?(?:last |recent |latest )?(?:changes|history|actions|events)<LAST>"),
    ("who_scaled", r"(?:who|what|when|why)<HAVE>(?: last)?(?: the)? <SCALED><UP> <model><UP>(?: last)?"),
    ("who_scaled", r"(?:why|when)<HAVE> <model>(?: been| get| got)? <SCALED><UP>(?: last)?"),
    ("who_scaled", rf"why does <model> have (?:{NUMBER}|so many|so few)<REPLICAS>"),
    ("why_slow", r"(?:why|how come)<HAVE> <model><SO> <SLOW>\b.*"),
    ("why_slow", r"(?:is|are) <model><SO> <SLOW>"),
    ("why_slow", r"<model> (?:is|are)<SO> <SLOW>"),
    ("why_slow", r"what(?: is)?<THE> (?:wrong|matter|problem|up|happening|going on|ailing|slowing)(?: down)?(?: "
     r"(?:with|to|at|on))? <model>"),
    ("why_slow", r"(?:diagnose|debug|troubleshoot|examine) <model>"),
    ("audit", r"(?:is|was)<THE> audit(?: log| trail| chain)?(?: still)? <FINE>"),
    ("audit", r"(?:verify|check|validate|test)<THE> (?:audit|chain)(?: log| trail| chain)?"),
    ("audit", r"(?:has|did) (?:any|some)(?:one|body) (?:tampered?|touched?|changed?|altered?|edited?)(?: with)?"
     r"<THE> audit(?: log| trail)?"),
    ("proposals", r"<SHOW>(?:(?:any|my|open|pending|waiting) )*proposals?(?: (?:open|waiting|pending))?"),
    ("proposals", r"(?:what|which|are|is)(?: there)?(?: (?:are|is|any|the|all|my|open|pending|waiting))* proposals?(?: "
     r"(?:are|is|there|open|waiting|pending))*"),
    ("proposals", r"(?:what|who|which|anything)(?: is| are)? (?:waiting|waits?|pending|open|to approve|needs? approval)"
     r"(?: for (?:approval|me|my approval|a decision))?"),
    ("proposals", r"(?:pending )?approvals|inbox"),
    ("running", r"(?:what|which|who)(?: workflows?| calls?)?(?: is| are)?(?: currently)? (?:running|in"
     r" flight|active|going on)"),
    ("running", r"<SHOW>(?:running|active) (?:workflows?|calls?)|what (?:is|are) (?:swarmx|you) doing"),
    ("help", r"help|what can (?:i|you)(?: (?:ask|say|do|order))?(?: you)?|examples|commands"),
    ("cluster", r"<SHOW><STATE>(?: (?:of|for) (?:the )?(?:whole )?<ALL>)?"),
    ("cluster", r"(?:how|what)(?: is| are| about)?(?: all)?<THE>(?: state of)?<THE> <ALL>(?: doing| going| looking|"
     r" today)?"),
    ("cluster", r"<SHOW><ALL>(?: <STATE>)?"),
    ("cluster", r"(?:is|are)<THE> <ALL> (?:all right|<FINE>)"),
    ("how_is", r"<SHOW>(?:<STATE>|queue|latency|bounds|replicas) (?:of|for|on|at) <model>"),
    ("how_is", r"how(?: is| are| does)? <model>(?: doing| going| looking| do| performing| running)?"),
    ("how_is", r"how many (?:replicas|instances|copies)(?: does| of| has)? <model>(?: have| has| run| are there)?"),
    ("how_is", r"(?:show|inspect|describe)(?: me)? <model>"),
    ("how_is", r"<model> <STATE>"),
)  # fmt: skip


def _compiled(text: str) -> re.Pattern[str]:
    while words := re.search(r"<([A-Z]+)>", text):
        text = text.replace(words[0], _WORDS[words[1]])
    return re.compile(re.sub(r"(?<!\?P)<(\w+)>", lambda p: f"(?P<{p[1]}>{_CAPTURED[p[1]]})", text), re.IGNORECASE)


SENTENCES = tuple((what, _compiled(text)) for what, text in (*_ORDERS, *_QUESTIONS))

MANNERS = re.compile(
    r"(?:(?:please|kindly|hey|hi|hello|ok|okay|so|and|then|swarmx|(?:can|could|would|will) you|can i|may i|"
    r"i want you to|i want to|i would like you to|i would like to|we should|you should|tell me|let us|lets|just)"
    r"\b[,:]? )+",
    re.IGNORECASE,
)
THANKS = re.compile(
    r"(?:[,;]? (?:please|right now|now|thanks|thank you|for me|immediately|at once|at the moment|currently|again))+$",
    re.IGNORECASE,
)
