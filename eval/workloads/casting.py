"""Who plays whom: which recorded prompts stand for a role, and which recorded model for one of the fleet.

No data set tells how long the answers of an agent's planner or coder on these very models are. So a call draws a real
prompt of the categories that come nearest to its role, and the answer that a model of the same class really gave. This
is an assumption of every result on these workloads.
"""

from __future__ import annotations

from collections.abc import Mapping

from eval.workloads.draft import LARGE, SMALL

_ARENA: Mapping[str, float] = {"arena-bench-v1": 0.5, "chatbot-arena": 0.5}  # what people asked chat assistants

ROLES: Mapping[str, Mapping[str, float]] = {
    "chat/chat": _ARENA,
    "coding/planner": _ARENA,
    "coding/coder": {"crux": 0.6, "arena-bench-v1": 0.4},  # reasoning about programs, and longer pieces of work
    "coding/fixer": {"crux": 1.0},
    "coding/reviewer": {"crux": 1.0},
    "coding/answer": _ARENA,
    "research/planner": _ARENA,
    "research/search": {"numersense-v2": 1.0},  # short
    "research/reader": {"gsm": 0.7, "chatbot-arena": 0.3},  # what follows from a text, in steps
    "research/synthesis": {"gsm": 0.5, "arena-bench-v1": 0.5},
    "research/writer": {"arena-bench-v1": 1.0},
    "media/rewriter": {"chatbot-arena": 1.0},
}
"""Categories of prompts by `kind/role`, with their weights."""

STANDS_FOR: Mapping[str, Mapping[str, str]] = {
    SMALL: {
        "gsm": "Meta-Llama-3.1-8B-Instruct",
        "crux": "Meta-Llama-3.1-8B-Instruct",
        "numersense-v2": "Meta-Llama-3-8B-Instruct",
        "arena-bench-v1": "vicuna-7b-v1.5",
        "chatbot-arena": "vicuna-7b-v1.5",
    },
    LARGE: {
        "gsm": "Meta-Llama-3-70B-Instruct",
        "crux": "Meta-Llama-3-70B-Instruct",
        "numersense-v2": "Meta-Llama-3-70B-Instruct",
        "arena-bench-v1": "Llama-2-70b-chat",
        "chatbot-arena": "Llama-2-70b-chat",
    },
}
"""Recorded models by model of the fleet and category; all are models of the train split, as a live predictor has met
the models that it serves. Where a table lacks one, the rows of all models of its size stand in (`size_class`)."""

CONTEXT_TOKENS: Mapping[str, int] = {SMALL: 131_072, LARGE: 131_072}
"""What a model of the fleet can read and write in one call."""

_LARGE_FROM_B = 30.0


def size_class(params_b: float | None) -> str:
    """The model of the fleet that a model with so many billions of parameters may stand for; one of which nothing is
    known is taken for a large one, as those of closed weights."""
    return SMALL if params_b is not None and params_b < _LARGE_FROM_B else LARGE
