"""The kinds of workflows: who calls whom, in what order, reading what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from eval.workloads.draft import CPU, FLUX, LARGE, OCR, SDXL, SMALL, Draft, Turn
from eval.workloads.text import Piece, first_tokens, key_of, tokens_of


def chat(draft: Draft) -> None:
    """One call to the small model, after the turns of a conversation that came before."""
    history = draft.own("history", draft.inventions.tokens("chat_history", draft.rng))
    draft.ask("chat", SMALL, context=(history,))


def coding(draft: Draft) -> None:
    """A plan, parallel coders over the same repository, a review, loops of fix and review, and the final answer."""
    rng, invented = draft.rng, draft.inventions
    repository = (draft.own("repository", invented.tokens("repository", rng)),)
    request = draft.truth.llm("coding/planner", LARGE, rng)
    coders = invented.count("coders", rng, request.hint)
    repairs = invented.count("repairs", rng, request.hint)
    plan = draft.ask("planner", LARGE, context=repository, drawn=request)
    code = [draft.ask("coder", SMALL, after=[plan], context=repository, reads=[plan]) for _ in range(coders)]
    read = [plan, *code]
    last = draft.ask("reviewer", LARGE, after=code, context=repository, reads=read)
    for _ in range(repairs):
        gap_s = invented.amount("test_gap", rng)
        fix = draft.ask("fixer", SMALL, after=[last], context=repository, reads=[*read, last], gap_s=gap_s)
        read += [last, fix]
        last = draft.ask("reviewer", LARGE, after=[fix], context=repository, reads=read)
    draft.ask("answer", LARGE, after=[last], context=repository, reads=[plan, last])


def research(draft: Draft) -> None:
    """A plan, parallel searches and readers, a synthesis, sometimes a second round, and the writer."""
    rng, invented = draft.rng, draft.inventions
    question = draft.truth.llm("research/planner", LARGE, rng)
    rounds = [invented.count("readers", rng, question.hint)]
    if invented.happens("second_round", rng):
        rounds.append(invented.count("more_readers", rng, question.hint))
    last = draft.ask("planner", LARGE, drawn=question)
    syntheses: list[int] = []
    for width in rounds:
        notes = [_read(draft, last) for _ in range(width)]
        last = draft.ask("synthesis", LARGE, after=notes, reads=[*syntheses, *notes])
        syntheses.append(last)
    draft.ask("writer", LARGE, after=[last], reads=syntheses)


def _read(draft: Draft, asked_by: int) -> int:
    """Word a search, wait for it, and read what it found."""
    search = draft.ask("search", SMALL, after=[asked_by], reads=[asked_by])
    page = draft.own(f"page {search}", draft.inventions.tokens("page", draft.rng))
    gap_s = draft.inventions.amount("search_gap", draft.rng)
    return draft.ask("reader", SMALL, after=[search], context=(page,), gap_s=gap_s)


def media(draft: Draft) -> None:
    """The prompt is rewritten, then up to four images are made at once; sometimes the first is made larger."""
    rng, invented = draft.rng, draft.inventions
    model = FLUX if invented.happens("on_flux", rng) else SDXL
    request = draft.truth.llm("media/rewriter", SMALL, rng)
    images = invented.count("images", rng, request.hint)
    image = draft.truth.image(model, rng)  # the images of one request differ in their seeds only
    rewrite = draft.ask("rewriter", SMALL, drawn=request)
    draft.source = image.source  # it takes longer than the prompt
    made = [draft.work("image", model, image.work, after=[rewrite]) for _ in range(images)]
    if invented.happens("upscale", rng):
        draft.work("upscale", SDXL, invented.tokens("upscale_work", rng), after=made[:1])


def pools(draft: Draft) -> None:
    """Three stages on processors: take a document or clip in, work on its parts side by side, put it together."""
    rng, invented = draft.rng, draft.inventions
    pages = invented.count("pages", rng, float(rng.standard_normal()))

    def task(role: str, model: str, name: str, after: Sequence[int]) -> int:
        expected = invented.tokens(name, rng)
        return draft.work(role, model, expected, after=after, noise="task_noise")

    taken = task("intake", CPU, "intake_work", [])
    parts = [task("ocr", OCR, "ocr_work", [taken]) for _ in range(pages)]
    task("index", CPU, "index_work", parts)


def sessions(draft: Draft) -> None:
    """A recorded agent session, call by call, on the small model."""
    replay(draft, draft.truth.session(draft.rng))


def replay(draft: Draft, turns: Sequence[Turn]) -> None:
    """Each prompt of a role is its prompt before, the answer to it, and what is new.

    Where a recorded prompt is shorter than the one before, the agent has begun a new conversation, and only what all
    sessions share stands in front.
    """
    said: dict[str, list[Piece]] = {}
    for place, turn in enumerate(turns):
        size = turn.drawn.prompt_tokens
        shared = [Piece(key_of("session", turn.shared), turn.shared_tokens)] if turn.shared_tokens else []
        before = said.get(turn.role, shared)
        if tokens_of(before[:-1]) > size:
            before = shared
        prompt = first_tokens(before, size)
        prompt.append(draft.own(f"new {place}", size - tokens_of(prompt)))
        draft.put(
            turn.role, SMALL, prompt, turn.drawn, after=[place - 1] if place else [], gap_s=turn.gap_s if place else 0.0
        )
        said[turn.role] = [*prompt, draft.calls[place].answer]


KINDS: Mapping[str, Callable[[Draft], None]] = {
    "chat": chat,
    "coding": coding,
    "research": research,
    "media": media,
    "pools": pools,
    "sessions": sessions,
}
