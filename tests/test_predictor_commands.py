"""The commands of the predictors, on small weights and on the database that a server left."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from msgspec.structs import replace

from swarmx import predictor_commands
from swarmx.cli import main
from swarmx.core.prompts import cut
from swarmx.core.records import CallRecord
from swarmx.memory.postgres.store import PostgresStore
from swarmx.memory.sqlite import SqliteStore
from swarmx.neural.encoders.hashed import load_hashed
from swarmx.neural.forecaster import shipped_weights
from swarmx.neural.report import cards_in
from tests.gateway.test_predictor_metrics import FINISHED
from tests.neural.length_weights import write_weights
from tests.postgres import PostgresServer

ROLE = "report/writer"


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SWARMX_URL", "SWARMX_TOKEN", "SWARMX_STATE_DIR", "SWARMX_CONFIG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_weights(folder, models=("m",))
    return folder


@pytest.fixture(scope="module")
def state_dir(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with 240 finished calls of two roles, one that failed, and one that another encoder read."""
    folder = tmp_path_factory.mktemp("state")
    encoder = load_hashed(weights)
    rng = np.random.default_rng(0)

    def record(number: int, **changes: Any) -> CallRecord:
        text = b"Write a story about %d ships." % number if number % 2 else b"Answer with one word: %d?" % number
        tokens = float(np.round(rng.lognormal(6.0 if number % 2 else 2.0, 0.3)))
        made = replace(
            FINISHED,
            call_id=f"c{number}",
            prompt_key=f"k{number}",
            workflow_kind="report",
            role="writer" if number % 2 else "judge",
            device="h100" if number % 3 else "l40s",
            work_done=tokens,
            work_limit=4096.0,
            ready_at_s=float(number),
            ended_at_s=number + 1.5,  # so that the next call begins before this one has ended
            forecast_source="neural" if number % 4 else "prior",
            encoder=encoder.version,
            encoding=encoder.encode_one(cut(text)).astype("<f2").tobytes(),
        )
        return replace(made, **changes)

    async def write() -> None:
        store = SqliteStore(folder / "swarmx.db")
        await store.open()
        for number in range(240):
            await store.record_call(record(number))
        await store.record_call(record(1, call_id="failed", state="failed"))
        await store.record_call(record(1, call_id="foreign", encoder="another-1"))
        await store.close()

    asyncio.run(write())
    return folder


def run(state_dir: Path, *arguments: str, **more: Any) -> Result:
    return CliRunner().invoke(main, ["--state-dir", str(state_dir), *arguments], **more)


def data(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def explained(state_dir: Path, weights: Path, *arguments: str, **more: Any) -> Any:
    options = ["--json", "predictor", "explain", "--weights", str(weights), *arguments]
    return data(run(state_dir, *options, **more))


def test_the_words_of_a_prompt_are_told_with_their_factors(tmp_path: Path, weights: Path) -> None:
    words = ("predictor", "explain", "--weights", str(weights), "--text", "Write write\x1b[31m it.", "--model", "m")
    result = run(tmp_path, *words)
    assert result.exit_code == 0, result.output
    assert "output tokens at the median" in result.output
    assert "kind of text" in result.output
    assert "write" in result.output
    assert "\x1b" not in result.output
    assert not (tmp_path / "swarmx.db").exists(), "looking leaves nothing behind"


def test_moves_and_words_are_there_as_json(tmp_path: Path, weights: Path) -> None:
    found = explained(tmp_path, weights, "--text", "Write it.", "--model", "m", "--limit", "50")
    explanation = found["explanation"]
    total = np.log(explanation["base"] + 1.0) + sum(move["log"] for move in explanation["moves"])
    assert total == pytest.approx(np.log(explanation["median"] + 1.0))
    assert {("write",), ("it",), ("write it",)} <= {tuple(word["words"]) for word in explanation["words"]}
    assert (found["learnt_from"], found["nearest"], found["limit"]) == (0, [], 50.0)


@pytest.mark.parametrize("way", ["file", "option", "dash"])
def test_a_prompt_comes_from_a_file_or_from_standard_input(tmp_path: Path, weights: Path, way: str) -> None:
    (tmp_path / "prompt").write_bytes(b"\xff\x00 any bytes at all")
    source = {"file": [str(tmp_path / "prompt")], "option": ["--file", str(tmp_path / "prompt")], "dash": ["-"]}[way]
    found = explained(tmp_path, weights, *source, "--model", "m", input=b"any bytes at all")
    assert any("bytes" in word["words"] for word in found["explanation"]["words"])


def test_an_empty_prompt_and_a_large_one_are_explained(tmp_path: Path, weights: Path) -> None:
    assert explained(tmp_path, weights, "--text", "", "--model", "m")["explanation"]["words"] == []
    assert explained(tmp_path, weights, "-", "--model", "m", input=b"long " * 200_000)["explanation"]["words"]


def test_what_the_state_folder_remembers_is_learnt_and_the_nearest_prompts_are_named(
    state_dir: Path, weights: Path
) -> None:
    asked = ("--text", "Write a story about 7 ships.", "--model", "m", "--role", ROLE)
    found = explained(state_dir, weights, *asked)
    assert found["learnt_from"] == 240
    assert found["explanation"]["role_seen"] == 120
    assert {row["role"] for row in found["nearest"]} == {"writer"}
    assert found["nearest"][0]["similarity"] > 0.95
    assert "text" not in found["nearest"][0]
    without = explained(state_dir, weights, *asked, "--no-memory")
    assert (without["explanation"]["role_seen"], without["nearest"]) == (0, [])


def test_a_stored_call_is_explained_without_its_words(state_dir: Path, weights: Path) -> None:
    found = explained(state_dir, weights, "--call", "c101")
    assert (found["model"], found["role"], found["limit"]) == ("m", ROLE, 4096.0)
    assert found["learnt_from"] == 100, "what ended later was not known then"
    assert found["explanation"]["words"] == []
    assert found["call"]["work_done"] > 0.0
    result = run(state_dir, "predictor", "explain", "--weights", str(weights), "--call", "c101")
    assert "Its text was not kept" in result.output


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--model", "m"], 2, "give one prompt"),
        (["--text", "a", "--call", "c1"], 2, "give one prompt"),
        (["--text", "a"], 2, "--model is missing"),
        (["--text", "a", "--model", "m", "--limit", "0"], 2, "Invalid value"),
        (["--call", "c1", "--model", "m"], 2, "has its own model"),
        (["--call", "nobody"], 1, "no call 'nobody'"),
        (["--call", "failed"], 1, "no call 'failed'"),
        (["--call", "foreign"], 1, "it was read by another-1"),
    ],
)
def test_what_cannot_be_explained_is_told_plainly(
    state_dir: Path, weights: Path, arguments: list[str], status: int, words: str
) -> None:
    result = run(state_dir, "predictor", "explain", "--weights", str(weights), *arguments)
    assert result.exit_code == status
    assert words in result.output


def test_weights_that_are_damaged_and_a_folder_without_a_database_are_told_plainly(
    tmp_path: Path, weights: Path
) -> None:
    result = run(tmp_path, "predictor", "explain", "--weights", str(tmp_path), "--text", "a", "--model", "m")
    assert (result.exit_code, "cannot be read" in result.output) == (1, True)
    for arguments in (
        ["predictor", "explain", "--call", "c", "--weights", str(weights)],
        ["predictor", "report", "--out", str(tmp_path / "out"), "--weights", str(weights)],
        ["train", "--from-memory", "--out", str(tmp_path / "out"), "--weights", str(weights)],
    ):
        result = run(tmp_path, *arguments)
        assert result.exit_code == 1
        assert "there is no database in" in result.output


def test_a_report_on_finished_calls_is_a_page_that_needs_nothing_else(
    state_dir: Path, weights: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    shown = data(run(state_dir, "--json", "predictor", "report", "--out", str(out), "--weights", str(weights)))
    (calls,) = shown["report"]["sets"]
    assert calls["overall"]["rows"] == 240
    assert set(calls["by"]["device"]) == {"h100", "l40s"}
    assert set(calls["by"]["role"]) == {"report/writer", "report/judge"}
    assert calls["overall"]["kendall_tau"] > 0.3, "the memory tells the two roles apart"
    assert {row["source"]: row["rows"] for row in shown["report"]["served"]} == {"neural": 181, "prior": 60}
    assert json.loads((out / "report.json").read_bytes()) == shown["report"]
    page = (out / "report.html").read_text()
    assert "<script" not in page
    assert "data:image/png;base64," in page
    assert "http" not in page
    assert (out / "calibration-1.png").read_bytes().startswith(b"\x89PNG")
    assert all(Path(path).exists() for path in shown["files"])


@pytest.mark.process
def test_calls_in_a_database_are_judged_and_learnt_from(
    state_dir: Path, weights: Path, tmp_path: Path, postgres: PostgresServer
) -> None:
    """Also where the folder has a database of its own, from before; a settings file without one means the folder."""

    async def fill() -> str:
        url = await postgres.new_database()
        store = PostgresStore(url)
        await store.open()
        for record in (await _finished(state_dir))[-50:]:
            await store.record_call(replace(record, call_id=f"shared-{record.call_id}"))
        await store.close()
        return url

    url = asyncio.run(fill())
    shared, own = tmp_path / "shared.toml", tmp_path / "own.toml"
    shared.write_text(f'[state]\ndatabase = "{url}"\n')
    own.write_text("[state]\njournal = false\n")
    report = ("--json", "predictor", "report", "--out", str(tmp_path / "out"), "--weights", str(weights))
    titles = [data(run(state_dir, *report, "--config", str(file)))["report"]["title"] for file in (shared, own)]
    assert titles == [f"Length forecasts of the last {count} finished calls" for count in (50, 241)]
    asked = ("--json", "predictor", "explain", "--weights", str(weights), "--config", str(shared))
    assert data(run(tmp_path, *asked, "--call", "shared-c239"))["call"]["call_id"] == "shared-c239"
    missed = run(state_dir, *asked, "--call", "c239")
    assert (missed.exit_code, "no call 'c239'" in missed.output) == (1, True)
    trained = ("train", "length", "--from-memory", "--out", str(tmp_path / "new"), "--weights", str(weights))
    assert data(run(tmp_path, "--json", *trained, "--config", str(shared)))["rows"] == 49  # one is another encoder's
    shared.write_text('[state]\ndatabase = "postgresql://nobody@127.0.0.1:1/none"\n')
    refused = run(state_dir, *report, "--config", str(shared))
    assert (refused.exit_code, "127.0.0.1:1" in refused.output) == (1, True)
    asyncio.run(postgres.drop(url))


def test_names_that_clients_chose_cannot_break_the_page(state_dir: Path, weights: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = asyncio.run(_finished(state_dir))
    evil = "<script>alert(1)</script>$x^{"
    (tmp_path / "state").mkdir()

    async def write() -> None:
        store = SqliteStore(tmp_path / "state" / "swarmx.db")
        await store.open()
        for record in records[:60]:
            await store.record_call(replace(record, role=evil if record.role == "writer" else "日本"))
        await store.close()

    asyncio.run(write())
    result = run(tmp_path / "state", "predictor", "report", "--out", str(tmp_path / "out"), "--weights", str(weights))
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


async def _finished(state_dir: Path) -> list[CallRecord]:

    store = SqliteStore(state_dir / "swarmx.db")
    await store.open()
    try:
        return await store.newest_finished(1000)
    finally:
        await store.close()


def test_a_report_says_when_no_call_can_be_judged(weights: Path, tmp_path: Path, state_dir: Path) -> None:
    pytest.importorskip("matplotlib")
    write_weights(tmp_path / "others", seed=1)
    result = run(
        state_dir, "predictor", "report", "--out", str(tmp_path / "out"), "--weights", str(tmp_path / "others")
    )
    assert result.exit_code == 0, result.output
    assert "None of these calls was read by the encoder" in result.output
    assert "As served" in (tmp_path / "out" / "report.html").read_text()


def corpus(folder: Path) -> Path:
    """Prompts whose first word says how long the answers are."""
    pl = pytest.importorskip("polars")
    rng = np.random.default_rng(0)
    prompts = [
        {"prompt_id": f"p{i}", "category": "c", "text": f"{('name', 'tell')[i % 2]} a thing of {i % 7} parts"}
        for i in range(90)
    ]
    answers = [
        {"prompt_id": f"p{i}", "model": f"m{m}", "out_tokens": int(20 * 4 ** (i % 2) * rng.uniform(1, 2)), "limit": 99}
        for i in range(90)
        for m in range(6)
    ]
    folder.mkdir()
    pl.DataFrame(prompts).write_parquet(folder / "prompts.parquet")
    pl.DataFrame(answers).write_parquet(folder / "lengths.parquet")
    return folder


def test_trained_weights_are_reported_on_their_test_split(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    folder, out = corpus(tmp_path / "data"), tmp_path / "weights"
    made = data(
        run(tmp_path, "--json", "train", "length", "--data", str(folder), "--out", str(out), "--licence", "CC0-1.0")
    )
    assert [card["version"].partition("-")[0] for card in made["weights"]] == [
        "encoder_hashed", "length_memory", "length",
    ]  # fmt: skip
    assert {card.licence for card in cards_in(out)} == {"CC0-1.0"}
    shown = data(
        run(tmp_path, "--json", "predictor", "report", "--data", str(folder), "--out", str(tmp_path / "report"),
            "--weights", str(out))
    )  # fmt: skip
    names = [found["name"] for found in shown["report"]["sets"]]
    assert names[0] == "Unseen prompts"
    assert f"{names[0]}, on the first day" in names
    assert shown["report"]["sets"][0]["overall"]["kendall_tau"] > 0.4
    assert explained(tmp_path, out, "--text", "tell a thing", "--model", "m0")["explanation"]["median"] > 30.0


def test_a_head_that_learnt_from_memory_is_written_when_it_is_better(
    state_dir: Path, weights: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = data(
        run(state_dir, "--json", "train", "length", "--from-memory", "--out", str(out), "--weights", str(weights))
    )
    assert result["rows"] == 240
    assert result["held_back"] == 48
    assert result["better"]
    assert result["loss_after"] < result["loss_before"]
    found = explained(state_dir, out, "--text", "Write a story.", "--model", "m", "--role", ROLE)
    assert found["explanation"]["head"] == result["version"], "encoder and memory went along"
    card = next(card for card in cards_in(out) if card.name == "length")
    assert card.metrics["held_back_loss"] == pytest.approx(result["loss_after"])


def test_a_head_that_is_not_better_is_written_by_force_alone(state_dir: Path, weights: Path, tmp_path: Path) -> None:
    better = tmp_path / "better"
    arguments = ["train", "--from-memory", "--out", str(better)]
    for _ in range(40):  # until there is nothing left to learn
        source = better if better.exists() else weights
        last = data(run(state_dir, "--json", *arguments, "--weights", str(source)))
        if not last["better"]:
            break
    assert not last["better"]
    out = tmp_path / "out"
    result = run(state_dir, "train", "--from-memory", "--out", str(out), "--weights", str(better))
    assert result.exit_code == 0
    assert "nothing was written" in result.output
    assert not out.exists()
    forced = run(state_dir, "train", "--from-memory", "--out", str(out), "--weights", str(better), "--force")
    assert "although it is not better" in forced.output
    assert (out / "length.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "'nothing' is not one of"),
        ([], "--data DIR, or train --from-memory"),
        (["image", "--from-memory"], "trains the head length"),
        (["length", "--data", ".", "--from-memory"], "trains the head length"),
        (["length", "--data", ".", "--force"], "belong to --from-memory"),
        (["--data", ".", "--encoder", "sentence"], "by the length head alone"),
        (["length", "--from-memory", "--encoder", "sentence"], "trains the head length"),
    ],
)
def test_a_training_that_makes_no_sense_is_told_plainly(tmp_path: Path, arguments: list[str], words: str) -> None:
    result = run(tmp_path, "train", "--out", str(tmp_path / "out"), *arguments)
    assert result.exit_code == 2
    assert words in result.output


def test_a_folder_without_the_files_is_told_plainly(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    result = run(tmp_path, "train", "length", "--data", str(tmp_path), "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "lengths.parquet" in result.output


def test_without_the_extra_the_error_names_it(
    tmp_path: Path, state_dir: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("swarmx.neural.training")]:
        monkeypatch.delitem(sys.modules, name)
    for missing in ("torch", "polars", "matplotlib", "matplotlib.figure", "matplotlib.axes"):
        monkeypatch.setitem(sys.modules, missing, None)
    for arguments in (
        ["train", "length", "--data", str(tmp_path), "--out", str(tmp_path / "out")],
        ["predictor", "report", "--out", str(tmp_path / "out"), "--weights", str(weights)],
    ):
        result = run(state_dir, *arguments)
        assert result.exit_code == 1
        assert 'install "swarmx[train]"' in result.output


def test_the_page_on_predictors_says_what_the_card_says() -> None:
    page = " ".join((Path(__file__).parents[1] / "docs" / "predictors.md").read_text().split())
    card = next(card for card in cards_in(shipped_weights()) if card.name == "length")
    scores, levels = card.metrics, card.calibration
    assert (
        f"pinball {scores['pinball']:.1f} tokens, CRPS {scores['crps']:.1f}, Kendall τ {scores['kendall_tau']:.2f} on "
        f"{card.counts['test']:,} answers"
    ) in page
    assert f"{100 * levels['0.5']:.1f}, {100 * levels['0.9']:.1f} and {100 * levels['0.99']:.1f} % of them" in page
    assert f"{scores['pinball_log']:.2f} on the card's test split" in page


def test_every_head_that_can_be_trained_can_be_named() -> None:
    run_module = pytest.importorskip("swarmx.neural.training.run")
    assert tuple(run_module.HEADS) == predictor_commands.HEADS
