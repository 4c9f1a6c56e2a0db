"""The training of the latency regressors."""

from __future__ import annotations

import lightgbm
import numpy as np

from eval.fit.llmd import Rows, complete, episode, fit, report
from swarmx.agents.policies.llmd_predicted import FEATURES
from swarmx.agents.policies.trees import DEPTH, LEAVES, trees_from
from swarmx.core.engine import EngineProfile, profiles


def test_trees_that_are_laid_out_predict_as_the_booster_does() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 4)).astype(np.float32).astype(np.float64)
    y = np.sin(3 * x[:, 0]) + x[:, 1] * x[:, 2]
    settings = {"max_depth": DEPTH, "num_leaves": LEAVES, "verbose": -1, "num_threads": 1, "seed": 0}
    booster = lightgbm.train(settings, lightgbm.Dataset(x, y), num_boost_round=20)
    arrays = {f"t_{key}": value for key, value in complete(booster).items()}
    np.testing.assert_allclose(trees_from(arrays, "t", 4).predict(x), booster.predict(x), rtol=1e-5, atol=1e-5)


def test_calls_on_an_idle_serial_server_take_what_they_take_alone() -> None:
    server = EngineProfile(model="m", device="d", step_base_s=0.1, max_batch=1)
    for sent in episode(server, np.random.default_rng(3)):
        if sent.row[FEATURES.index("running")] == 0.0:
            assert sent.first_s - sent.at_s < 0.2 + 1e-9
        assert sent.end_s - sent.first_s <= 0.1 * (sent.output - 1) + 1e-6


def test_regressors_learn_that_load_makes_calls_slow() -> None:
    rng = np.random.default_rng(0)
    sent = [s for _ in range(6) for s in episode(profiles()["llama-3.1-8b", "h100"], rng)]
    rows = Rows(
        x=np.array([s.row for s in sent]),
        ttft=np.array([(s.first_s - s.at_s) / s.step_s for s in sent]),
        tpot=np.array([(s.end_s - s.first_s) / max(1, s.output - 1) / s.step_s for s in sent]),
        episode=np.zeros(len(sent), dtype=np.int64),
    )
    scores = report(fit(rows, trees=20, rate=0.2), rows)
    spread = float(np.abs(np.log(rows.ttft / np.median(rows.ttft))).mean())
    assert scores["ttft_log_mae"] < 0.6 * spread
    assert 0.8 < scores["tpot_p90_coverage"] < 0.97
