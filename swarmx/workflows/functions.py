"""The pure functions that tool nodes call and that templates use as filters: a closed, bounded set."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgspec

from swarmx.core.errors import WorkflowError
from swarmx.workflows.limits import LIST_ITEMS, TEXT_CHARS
from swarmx.workflows.values import Json, as_text, checked, parse_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """`required` and `optional` name its parameters; as a filter, the first one is what stands left of the bar."""

    call: Callable[..., Json]
    doc: str
    required: tuple[str, ...]
    optional: tuple[str, ...]


def concat(parts: Json, separator: str = "") -> str:
    """The parts of a list as one text, with `separator` between them."""
    return _joined(_list(parts), _text(separator))


def split_lines(text: Json) -> list[str]:
    """The lines of a text, trimmed, without empty ones."""
    lines = [line.strip() for line in _text(text).splitlines()]
    return [line for line in lines if line]


def json_parse(text: Json) -> Json:
    """The value that a JSON text stands for."""
    return parse_json(_text(text))


def json_dump(value: Json) -> str:
    """The value as JSON text."""
    return msgspec.json.encode(checked(value)).decode()


def pick(value: Json, key: str) -> Json:
    """The field `key` of a mapping ("a.b" goes deeper); of a list, that field of every item."""
    for part in _text(key).split("."):
        value = [_field(item, part) for item in _list(value)] if isinstance(value, list) else _field(value, part)
    return value


def where(items: Json, key: str, equals: Json = True) -> list[Json]:
    """The items of a list of mappings whose field `key` equals the value."""
    return [item for item in _list(items) if _field(item, _text(key)) == equals]


def length(value: Json) -> int:
    """The number of characters, items or fields."""
    if not isinstance(value, str | list | dict):
        raise WorkflowError(f"length wants a text, list or mapping, got {_short(value)}")
    return len(value)


def sort(items: Json, by: str | None = None, descending: bool = False) -> list[Json]:
    """The items in order: all numbers or all texts; `by` names the field that mappings are ordered by."""
    values = _list(items)
    keys = [_field(item, by) for item in values] if by else values
    if not (all(_is_number(key) for key in keys) or all(isinstance(key, str) for key in keys)):
        raise WorkflowError("sort wants only numbers or only texts; name a field with `by` to order mappings")
    order = sorted(range(len(values)), key=lambda i: keys[i], reverse=bool(descending))
    return [values[i] for i in order]


def unique(items: Json) -> list[Json]:
    """The items without repetitions, in their first order."""
    found: dict[str, Json] = {}
    for item in _list(items):
        found.setdefault(json_dump(item), item)
    return list(found.values())


def slice_(value: Json, start: int = 0, end: int | None = None) -> Json:
    """The part of a text or list from position `start` up to, not including, `end`."""
    if not isinstance(value, str | list):
        raise WorkflowError(f"slice wants a text or a list, got {_short(value)}")
    return value[_whole(start) : None if end is None else _whole(end)]


def first(value: Json) -> Json:
    """The first item of a list that is not empty."""
    return _some(value)[0]


def last(value: Json) -> Json:
    """The last item of a list that is not empty."""
    return _some(value)[-1]


def word_count(text: Json) -> int:
    """The number of words between white space."""
    return len(_text(text).split())


def trim(text: Json) -> str:
    """The text without white space around it."""
    return _text(text).strip()


def lower(text: Json) -> str:
    """The text in small letters."""
    return _text(text).lower()


def upper(text: Json) -> str:
    """The text in capitals."""
    return _text(text).upper()


def replace(text: Json, old: str, new: str) -> str:
    """The text with every `old` replaced by `new`."""
    source, old, new = _text(text), _text(old), _text(new)
    if not old:
        raise WorkflowError("replace wants a text to look for, got an empty one")
    if len(source) + source.count(old) * (len(new) - len(old)) > TEXT_CHARS:
        raise WorkflowError(f"replace would give more than {TEXT_CHARS} characters; hand in less")
    return source.replace(old, new)


def sum_(items: Json) -> Json:
    """The sum of a list of numbers; of an empty list, 0."""
    return sum(_numbers(items))


def mean(items: Json) -> float:
    """The mean of a list of numbers that is not empty."""
    return float(sum(_numbers(_some(items)))) / len(items)


def max_(items: Json) -> Json:
    """The largest of a list of numbers that is not empty."""
    return max(_numbers(_some(items)))


def min_(items: Json) -> Json:
    """The smallest of a list of numbers that is not empty."""
    return min(_numbers(_some(items)))


def number(value: Json) -> Json:
    """The number that a text stands for; a number stays itself."""
    if _is_number(value):
        return value
    text = _text(value).strip()
    for read in (int, float):
        try:
            return checked(read(text[:64]))
        except ValueError:
            continue
    raise WorkflowError(f"number wants a text such as 7 or 0.5, got {_short(value)}")


def round_(value: Json, digits: int = 0) -> Json:
    """The number rounded to so many digits (a whole number at 0)."""
    if not _is_number(value):
        raise WorkflowError(f"round wants a number, got {_short(value)}")
    places = _whole(digits)
    if not 0 <= places <= 15:
        raise WorkflowError(f"round wants 0 to 15 digits, got {places}")
    return round(value, places) if places else round(value)


def _function(call: Callable[..., Json]) -> Function:
    parameters = inspect.signature(call).parameters.values()
    return Function(
        call=call,
        doc=call.__doc__ or "",
        required=tuple(p.name for p in parameters if p.default is p.empty),
        optional=tuple(p.name for p in parameters if p.default is not p.empty),
    )


_ALL: Sequence[Callable[..., Json]] = (
    concat, split_lines, json_parse, json_dump, pick, where, length, sort, unique, slice_, first, last,
    word_count, trim, lower, upper, replace, sum_, mean, max_, min_, number, round_,
)  # fmt: skip

FUNCTIONS: Mapping[str, Function] = MappingProxyType({f.__name__.rstrip("_"): _function(f) for f in _ALL})


def call_function(name: str, arguments: Mapping[str, Any]) -> Json:
    """Call a function of the set by name. Raises WorkflowError, whatever the arguments are."""
    try:
        return checked(FUNCTIONS[name].call(**arguments))
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise WorkflowError(f"the function {name} cannot work with what it got: {error}") from error


def _joined(parts: list[Json], separator: str) -> str:
    texts: list[str] = []
    size = 0
    for part in parts:
        texts.append(as_text(part))
        size += len(texts[-1]) + len(separator)
        if size > TEXT_CHARS + len(separator):
            raise WorkflowError(f"the text would be longer than {TEXT_CHARS} characters; hand in less")
    return separator.join(texts)


def _field(value: Json, key: str) -> Json:
    if isinstance(value, dict) and key in value:
        return value[key]
    known = f"its fields are {', '.join(sorted(value)[:12])}" if isinstance(value, dict) else f"it is {_short(value)}"
    raise WorkflowError(f"there is no field {key!r}: {known}")


def _text(value: Json) -> str:
    if not isinstance(value, str):
        raise WorkflowError(f"a text was expected, got {_short(value)}")
    return value


def _list(value: Json) -> list[Json]:
    if not isinstance(value, list):
        raise WorkflowError(f"a list was expected, got {_short(value)}")
    if len(value) > LIST_ITEMS:
        raise WorkflowError(f"a list of at most {LIST_ITEMS} items was expected, got {len(value)}")
    return value


def _some(value: Json) -> list[Json]:
    if not _list(value):
        raise WorkflowError("a list with at least one item was expected, got an empty one")
    return _list(value)


def _numbers(value: Json) -> list[Any]:
    for item in _list(value):
        if not _is_number(item):
            raise WorkflowError(f"only numbers were expected, got {_short(item)}")
    return _list(value)


def _whole(value: Json) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise WorkflowError(f"a whole number was expected, got {_short(value)}")
    return value


def _is_number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Json) -> str:
    if isinstance(value, list | dict):
        return f"a {'list' if isinstance(value, list) else 'mapping'} of {len(value)}"
    return f"{value!r:.60}"
