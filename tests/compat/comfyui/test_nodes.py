"""What servers have between them."""

from __future__ import annotations

from typing import Any

import pytest

from swarmx.compat.comfyui.nodes import NodeBook


class Text(str):
    """A text that counts how often it is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Text.compared += 1
        return super().__eq__(other)


def info(options: list[Any]) -> dict[str, Any]:
    described = {"input": {"required": {"lora_name": [options, {}]}}, "python_module": "nodes"}
    return {"LoraLoader": described}


def options_of(book: NodeBook) -> tuple[Any, ...] | None:
    return book.specs["LoraLoader"].inputs["lora_name"].options


def test_options_of_servers_come_together_in_their_order_each_once() -> None:
    book = NodeBook()
    for server, options in (("a", ["x", "y"]), ("b", ["y", "z"]), ("c", ["w", "x"])):
        book.told(server, info(options))
    assert options_of(book) == ("x", "y", "z", "w")


def test_options_that_are_no_texts_come_together_too() -> None:
    book = NodeBook()
    book.told("a", info([["x"], {"y": 1}]))
    book.told("b", info([{"y": 1}, "z"]))
    assert options_of(book) == (["x"], {"y": 1}, "z")


def test_thousands_of_options_are_not_all_compared_with_each_other() -> None:
    book = NodeBook()
    for server in ("a", "b"):
        book.told(server, info([*(Text(number) for number in range(2000)), server]))
    found = options_of(book)
    assert found is not None
    assert len(found) == 2002
    assert Text.compared < 20_000


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ([["a.mp4", "swarmx-1.mp4"], {"x": 1}], [["a.mp4"], {"x": 1}]),
        (["COMBO", {"options": ["a.mp4", "swarmx-1.mp4"]}], ["COMBO", {"options": ["a.mp4"]}]),
    ],
)
def test_copies_of_uploads_are_not_shown_in_either_form_of_a_list(row: list[Any], shown: list[Any]) -> None:
    book = NodeBook(("*",), hidden="swarmx-")
    book.told("s1", {"LoadVideo": {"input": {"required": {"file": row}}, "output": ["VIDEO"], "output_node": False}})
    assert book.union["LoadVideo"]["input"]["required"]["file"] == shown
