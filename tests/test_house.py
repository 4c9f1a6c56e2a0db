"""Rules of the house that no linter knows."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "swarmx").rglob("*.py"))
# One concept a module; the few that are longer are lists of commands or one protocol from its beginning to its end.
_LONGEST = 430


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_says_what_it_is_for_and_is_no_longer_than_one_concept(path: Path) -> None:
    source = path.read_text()
    docstring = ast.get_docstring(ast.parse(source))
    assert docstring, "the first line of a module says what it is for"
    assert docstring.splitlines()[0].endswith((".", "?", ":", "`"))
    assert len(source.splitlines()) <= _LONGEST


def test_every_room_has_a_folder_of_tests() -> None:
    rooms = {path.name for path in (ROOT / "swarmx").iterdir() if path.is_dir()}
    missing = {room for room in rooms - {"__pycache__"} if not (ROOT / "tests" / room).is_dir()}
    assert missing <= {"neural"}, "neural is tested by a contract suite"
