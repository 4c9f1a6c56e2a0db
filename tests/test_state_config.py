"""The database of a server is named without its password."""

import pytest
from pydantic import ValidationError

from swarmx.state_config import StateSection


@pytest.mark.parametrize("url", ["", "postgresql://me@db:5432/swarmx", "postgresql://me@/swarmx?host=/run/postgresql"])
def test_a_database_is_a_url_or_nothing(url: str) -> None:
    assert StateSection(database=url).database == url


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://me:secret@db/swarmx", "leave the password out"),
        ("postgresql://me@db/swarmx?password=secret", "leave the password out"),
        ("mysql://me@db/swarmx", "expected postgresql://"),
        ("swarmx.db", "expected postgresql://"),
    ],
)
def test_a_password_and_other_databases_are_refused(url: str, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        StateSection(database=url)
