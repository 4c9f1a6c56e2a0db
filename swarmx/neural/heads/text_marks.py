"""What the last text of a workflow gives away about its end: a few marks, computed once, of a text that is not kept."""

from __future__ import annotations

import math

_TAIL = 600

# Stems in English, Spanish, French, German, Portuguese, Italian and Chinese, in small letters. A mark is a hint and no
# more: in another language it is absent, and the forecast is as good as without it.
_WORDS: dict[str, tuple[str, ...]] = {
    "thanks": ("thank", "gracias", "merci", "danke", "obrigad", "grazie", "谢谢", "感谢"),
    "farewell": (
        "bye", "great day", "good day", "nice day", "wonderful day", "take care", "welcome", "adios", "adiós",
        "hasta luego", "de nada", "buen día", "au revoir", "bonne journ", "tschüss", "wiedersehen", "schönen tag",
        "arrivederci", "tchau", "再见",
    ),
    "hand_over": (
        "transfer", "human agent", "escalat", "specialist", "representative", "transfir", "weiterleit", "转接", "人工",
    ),
    "done": (
        "done", "complete", "success", "resolved", "submitt", "finished", "final answer", "has been", "canceled",
        "cancelled", "listo", "completad", "terminé", "erledigt", "fertig", "完成",
    ),
    "more": (
        "anything else", "further assist", "else i can", "let me know", "feel free", "reach out", "algo más",
        "otra cosa", "autre chose", "noch etwas", "mais alguma", "altro",
    ),
    "agrees": ("yes", "sure", "confirm", "proceed", "go ahead", "sí,", "sí.", "oui", "ja,", "sim,", "好的", "是的"),
    "error": (
        "error", "exception", "traceback", "fail", "not found", "no such", "invalid", "denied", "cannot", "unable",
        "错误", "失败",
    ),
    "stop": ("###", "<|", "stop.", "terminate", "complete_task"),
}  # fmt: skip

MARKS = (*_WORDS, "asks", "exclaims", "machine", "digits", "length")
CLOSING = ("thanks", "farewell", "hand_over", "done", "more")

Marks = tuple[float, ...]

_DIGITS = dict.fromkeys(map(ord, "0123456789"))


def marks_of(text: bytes | str) -> Marks:
    """One number for each of `MARKS`, from the last 600 bytes of a prompt: 0 or 1, a share, or a logarithm."""
    tail = text[-_TAIL:].decode("utf-8", "replace") if isinstance(text, bytes) else text[-_TAIL:]
    tail = tail.strip().lower()
    return (
        *(1.0 if any(word in tail for word in words) else 0.0 for words in _WORDS.values()),
        1.0 if tail.endswith("?") else 0.5 if "?" in tail else 0.0,
        1.0 if tail.endswith("!") else 0.0,
        1.0 if tail[-1:] in ("}", "]", ">") or '": ' in tail or "</" in tail else 0.0,
        1.0 - len(tail.translate(_DIGITS)) / max(1, len(tail)),
        math.log1p(len(tail)),
    )
