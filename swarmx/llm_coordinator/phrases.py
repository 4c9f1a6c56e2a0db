"""The small words of operators' sentences: numbers, spans of time, and names as people shorten and misspell them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

NUMBER = (
    r"-?\d+|no|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty|forty-five|"
    r"forty|sixty|ninety"
)
_COUNT = rf"\d+(?:\.\d+)?|{NUMBER}|an?|a few|few|a couple of"
_UNIT = "seconds?|secs?|minutes?|mins?|hours?|hrs?|days?|[smhd]"
SPAN = rf"half an hour|(?:a )?quarter of an hour|(?:(?:{_COUNT}) ?)?(?:{_UNIT})"

_NUMBERS = {
    **{"no": 0, "zero": 0, "a": 1, "an": 1, "one": 1, "two": 2, "a couple of": 2, "three": 3, "four": 4, "five": 5},
    **{"few": 5, "a few": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12},
    **{"fifteen": 15, "twenty": 20, "thirty": 30, "forty": 40, "forty-five": 45, "sixty": 60, "ninety": 90},
}
_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_LONGEST_S = 30 * 86_400.0
_MOST_DIGITS = 6


def number(text: str) -> int:
    """The value of what NUMBER matched; what has too many digits stays just as absurd."""
    return _NUMBERS[text.lower()] if text.lower() in _NUMBERS else int(text[:_MOST_DIGITS])


def span_s(text: str) -> float:
    """The seconds that SPAN matched, 30 days at most."""
    text = text.lower().strip()
    if text == "half an hour":
        return 1800.0
    if text.endswith("quarter of an hour"):
        return 900.0
    count, unit = re.fullmatch(r"(.*?) ?([a-z]+)", text).groups()  # type: ignore[union-attr]  # SPAN matched
    value = float(_NUMBERS[count]) if count in _NUMBERS else float(count[:_MOST_DIGITS] or 1)
    return min(_LONGEST_S, abs(value) * _UNITS_S[unit[0]])


def span_words(seconds: float) -> str:
    """The span as people say it."""
    for unit, length_s in (("day", 86_400.0), ("hour", 3600.0), ("minute", 60.0)):
        if seconds >= length_s and seconds % length_s == 0:
            count = int(seconds / length_s)
            return f"{count} {unit}{'s' if count != 1 else ''}"
    return f"{seconds:g} seconds"


def resolve(word: str, names: Iterable[str]) -> tuple[str, ...]:
    """The names that may be meant: one that is equal, else those that begin so, contain it, or are spelled alike.

    A number is never taken for another one: "replica-7" does not mean "replica-1".
    """
    known = {name: _plain(name) for name in names}
    wanted = _plain(word)
    if not wanted:
        return ()
    for holds in (str.__eq__, str.startswith, str.__contains__):
        if found := tuple(name for name, plain in known.items() if holds(plain, wanted)):
            return found
    parts: dict[str, list[str]] = {}
    for name, plain in known.items():
        for part in {plain, *plain.split("-")}:
            parts.setdefault(part, []).append(name)
    alike = [p for p in get_close_matches(wanted, parts, n=5, cutoff=0.75) if _digits(p) == _digits(wanted)]
    return tuple(dict.fromkeys(name for part in alike for name in parts[part]))


def _plain(text: str) -> str:
    return re.sub(r"[\s_/:-]+", "-", text.lower()).strip("-")


def _digits(text: str) -> list[str]:
    return re.findall(r"\d+", text)
