"""From settings to pools of tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from swarmx.config import parse
from swarmx.core.errors import ConfigError
from swarmx.wiring.fleet import elastic_providers, fixed_providers, groups
from swarmx.wiring.toolbox import tool_pools


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "tools.toml"
    path.write_text(
        'pool = "box"\nslots = 3\n[[command]]\nname = "wc"\ndescription = ""\nargv = ["/usr/bin/wc"]\ntimeout_s = 90\n'
    )
    return str(path)


def elastic(file: str, **more: Any) -> dict[str, Any]:
    return {"model": "box", "provider": "tools", "file": file, **more}


def test_a_group_of_tools_has_the_slots_of_its_file_and_counts_seconds(file: str) -> None:
    (group,) = groups(parse({"elastic": [elastic(file)]}))
    assert (group.group_id, group.kind, group.device, group.start_s) == ("box-cpu", "tool", "cpu", 5.0)
    assert (group.profile.max_batch, group.profile.step_base_s, group.profile.decode_seq_s) == (3, 1.0, 0.0)
    assert group.profile.step_s(1, 0.0) == group.profile.step_s(3, 1e6), "whatever else is in the slots"


def test_one_provider_has_the_fixed_and_the_elastic_replicas(file: str, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text('pool = "other"')
    settings = parse(
        {"elastic": [elastic(file)], "tools": [{"file": str(other), "count": 2}], "scaler": {"drain_s": 90}}
    )
    tools = tool_pools(settings, Path("logs"))
    assert elastic_providers(settings, None, tools, Path("logs")) == {"tools": tools.here}
    assert tools.here in fixed_providers(settings, None, tools)


async def test_a_replica_that_somebody_else_runs_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAR_TOKEN", "far-away-secret")
    entry = {"id": "far", "url": "http://far:1/", "pool": "box", "slots": 7, "token_variable": "FAR_TOKEN"}
    settings = parse({"tools": [entry]})
    tools = tool_pools(settings, Path("logs"))
    (provider,) = fixed_providers(settings, None, tools)
    (replica,) = await provider.start()
    assert (replica.replica_id, replica.model, replica.kind, replica.url) == ("far", "box", "tool", "http://far:1")
    assert replica.profile.max_batch == 7
    assert (tools.token_of("far"), tools.token_of("a model's")) == ("far-away-secret", None)
    monkeypatch.delenv("FAR_TOKEN")
    with pytest.raises(ConfigError, match="does not have FAR_TOKEN, the token of far"):
        tool_pools(settings, Path("logs"))


def test_pools_that_cannot_work_are_refused(file: str) -> None:
    for wrong, said in (
        ({"tools": [{"file": "/no/such.toml"}]}, "cannot be read"),
        ({"tools": [{"file": file}, {"file": file}]}, "'box' is named twice"),
        ({"tools": [{"file": file}], "elastic": [elastic(file)]}, "'box' is named twice"),
        ({"elastic": [{**elastic(file), "model": "bax"}]}, "has the pool 'box', and not 'bax'"),
        ({"tools": [{"file": file}], "replicas": [{"id": "r", "model": "box", "url": "http://h"}]}, "name of a model"),
        ({"tools": [{"file": file}], "router": {"call_timeout_s": 60.0}}, "may take 90 s; router.call_timeout_s"),
        ({"elastic": [elastic(file)]}, "may take 90 s; scaler.drain_s must be as long"),
    ):
        with pytest.raises(ConfigError, match=said):
            tool_pools(parse(wrong), Path("logs"))
