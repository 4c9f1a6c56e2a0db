"""Retraining with real child processes, also ones that die, lie or dawdle."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from swarmx.core.actions import Retrain, UsePredictor
from swarmx.core.errors import PredictorError, StoreError
from swarmx.core.messages import Message, PredictorReady, RetrainEnded
from swarmx.core.records import CallRecord
from swarmx.neural.checkpoint import load_head
from swarmx.neural.head import Head
from swarmx.neural.table import Table
from swarmx.neural.training import retrain
from swarmx.runtime.retraining import Retraining, RetrainingSettings, Trainable
from tests.neural.heads import SPEC, a_head, a_table

pytestmark = pytest.mark.process

RETRAIN = Retrain(retrain_id="toy-1", head="toy", keys=(("chat", ""),))


class Scene:
    """One head in force, a memory that answers with nothing in particular, and rows that are three times as long."""

    def __init__(self, folder: Path, *, rows: int = 400, factor: float = 3.0, script: str | None = None,
                 settings: RetrainingSettings | None = None) -> None:  # fmt: skip
        self.folder = folder
        self.head = a_head()
        self.rows, self.factor = rows, factor
        self.posted: asyncio.Queue[Message] = asyncio.Queue()
        self.store_works = True
        self.retraining = Retraining(
            {"toy": Trainable(head=lambda: self.head, table_of=self.table_of, swap=self.swap)},
            newest=self.newest,
            folder=folder,
            post=self.posted.put_nowait,
            settings=settings or RetrainingSettings(),
            child=(sys.executable, "-m", "swarmx.neural.training.retrain")
            if script is None
            else (sys.executable, "-c", script),
        )

    async def newest(self, limit: int) -> list[CallRecord]:
        if not self.store_works:
            raise StoreError("the disk is gone")
        return []

    def table_of(self, records: Sequence[CallRecord]) -> Table:
        return a_table(rows=self.rows, factor=self.factor)

    def swap(self, head: Head) -> Head:
        previous, self.head = self.head, head
        return previous

    async def retrain(self) -> RetrainEnded:
        self.retraining.perform_retrain(RETRAIN)
        message = await self.posted.get()
        assert isinstance(message, RetrainEnded)
        return message

    async def failed(self) -> bool:
        """The retraining fails, and nothing is left of it but the news."""
        message = await self.retrain()
        assert (message.retrain_id, message.version) == ("toy-1", "")
        assert list(self.folder.glob("*")) == list(self.folder.glob(".work*")) == []
        return message.outcome == "failed"


async def test_a_head_is_trained_again_put_in_force_and_taken_back(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    message = await scene.retrain()
    assert message.outcome == "better"
    assert message.loss_after < 0.5 * message.loss_before
    assert scene.head.version == "toy-0"  # nobody has asked for the new one yet
    scene.retraining.perform_use(UsePredictor(head="toy", version=message.version))
    assert await scene.posted.get() == PredictorReady(head="toy", version=message.version, previous="toy-0")
    assert scene.head.version == message.version
    on_disk, card = load_head(tmp_path / message.version, SPEC)
    assert np.array_equal(on_disk.nets[0].out, scene.head.nets[0].out)
    assert card.settings["method"] == "refit"
    scene.retraining.perform_use(UsePredictor(head="toy", version="toy-0"))
    assert await scene.posted.get() == PredictorReady(head="toy", version="toy-0", previous=message.version)


async def test_a_head_that_fits_already_is_not_replaced(tmp_path: Path) -> None:
    message = await Scene(tmp_path, factor=1.0).retrain()
    assert (message.outcome, message.version) == ("worse", "")
    assert list(tmp_path.iterdir()) == []


async def test_a_child_that_dies_is_a_failure(tmp_path: Path) -> None:
    assert await Scene(tmp_path, script="import os; os.kill(os.getpid(), 9)").failed()


GARBAGE = {
    "no result": "",
    "a result that is no JSON": "put('result.json', b'\\xff\\x00')",
    "losses that are no numbers": 'put(\'result.json\', b\'{"version":"x","loss_before":null,"loss_after":1}\')',
    "a version that is not there": (
        'put(\'result.json\', b\'{"version":"../x","loss_before":1.0,"loss_after":0.5,"rows":9}\')'
    ),
}


@pytest.mark.parametrize("script", GARBAGE.values(), ids=GARBAGE.keys())
async def test_a_child_that_leaves_garbage_is_a_failure(tmp_path: Path, script: str) -> None:
    put = "import sys, pathlib\ndef put(name, data): (pathlib.Path(sys.argv[1]) / name).write_bytes(data)\n"
    assert await Scene(tmp_path, script=put + script).failed()


async def test_weights_that_were_cut_short_are_a_failure(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\nfrom swarmx.neural.training import retrain\n"
        "folder = pathlib.Path(sys.argv[1]); retrain.run(folder)\n"
        "path = folder / 'after' / 'toy.safetensors'; path.write_bytes(path.read_bytes()[:-9])\n"
    )
    assert await Scene(tmp_path, script=script).failed()


async def test_a_child_that_is_too_slow_is_killed(tmp_path: Path) -> None:
    script = f"import os, time; open({str(tmp_path.parent / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    assert await Scene(tmp_path, script=script, settings=RetrainingSettings(timeout_s=1.0)).failed()
    note = tmp_path.parent / "pid"  # not there when the machine was too busy for the child to begin
    assert not note.exists() or not Path(f"/proc/{note.read_text() or 'none'}").exists()


async def test_closing_kills_the_child(tmp_path: Path) -> None:
    pipe = tmp_path.parent / "pipe"
    os.mkfifo(pipe)
    script = f"import os, time; open({str(pipe)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    scene = Scene(tmp_path, script=script)
    scene.retraining.perform_retrain(RETRAIN)
    pid = await asyncio.to_thread(pipe.read_text)
    await scene.retraining.close()
    assert not Path(f"/proc/{pid}").exists()
    scene.retraining.perform_retrain(RETRAIN)  # too late
    assert scene.posted.empty()


async def test_too_few_records_are_a_failure_and_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(tmp_path, rows=50)
    with caplog.at_level(logging.INFO, "swarmx.runtime.retraining"):
        assert await scene.failed()
        assert await scene.failed()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "200 are needed" in caplog.text


async def test_a_memory_that_cannot_be_read_is_a_failure(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.store_works = False
    assert await scene.failed()


async def test_rows_that_cannot_be_made_are_a_failure(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.rows = -1  # numpy refuses
    assert await scene.failed()


async def test_an_unknown_head_is_a_failure(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.retraining.perform_retrain(msgspec.structs.replace(RETRAIN, head="odd"))
    message = await scene.posted.get()
    assert isinstance(message, RetrainEnded)
    assert (message.head, message.outcome) == ("odd", "failed")


@pytest.mark.parametrize("version", ["toy-unknown", "../elsewhere", ""])
async def test_a_version_that_cannot_be_had_leaves_what_is_in_force(tmp_path: Path, version: str) -> None:
    scene = Scene(tmp_path)
    scene.retraining.perform_use(UsePredictor(head="toy", version=version))
    await scene.retrain()  # the swap was tried before
    assert scene.head.version == "toy-0"
    assert scene.posted.empty()


async def test_old_versions_are_removed_but_not_the_one_in_force(tmp_path: Path) -> None:
    scene = Scene(tmp_path, settings=RetrainingSettings(kept=2))
    versions = []
    for factor in (2.0, 3.0, 4.0, 5.0):
        scene.factor = factor
        message = await scene.retrain()
        versions.append(message.version)
        if factor == 2.0:
            scene.retraining.perform_use(UsePredictor(head="toy", version=message.version))
            await scene.posted.get()
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {versions[0], *versions[2:]}


def test_training_anew_without_torch_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in [name for name in sys.modules if name.startswith("swarmx.neural.training.fit")]:
        monkeypatch.delitem(sys.modules, name)
    job = retrain.Job(spec=SPEC, method="fit")
    with pytest.raises(PredictorError, match=r"swarmx\[train\]"):
        retrain.retrain(a_head(), a_table(rows=200, factor=2.0), job)


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    table = a_table(rows=60, factor=2.0)
    retrain.write_rows(tmp_path / "rows.npz", table)
    back = retrain.read_rows(tmp_path / "rows.npz")
    assert np.array_equal(back.features, table.features)
    assert back.group.tolist() == table.group.tolist()
    (tmp_path / "rows.npz").write_bytes(b"PK")
    with pytest.raises(PredictorError, match="cannot be read"):
        retrain.read_rows(tmp_path / "rows.npz")


def test_every_fifth_row_is_held_back_and_newer_ones_weigh_more() -> None:
    table = retrain.held_back(a_table(rows=100, factor=1.0), half_life=10.0)
    assert (table.split == "validation").sum() == 20
    assert table.split[-1] == "validation"
    assert table.weight[-11] == pytest.approx(table.weight[-1] / 2.0)
