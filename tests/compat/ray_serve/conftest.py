"""One local Ray, with Serve, for all tests that need it; they are skipped where Ray is not installed."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pytest

_T = TypeVar("_T")

ROOT = Path(__file__).parents[3]
HAS_RAY = importlib.util.find_spec("ray") is not None
NO_RAY = "Ray is not installed here: `make setup-ray`, then `.venv-ray/bin/python -m pytest tests/compat/ray_serve`"

collect_ignore = [] if HAS_RAY else ["apps.py", "deploy.py", "cluster_drill.py", "llm_engine.py"]


def started(start: Callable[[], _T]) -> _T:
    """Ray gives a node half a minute to start, which it does not always make on a busy machine."""
    for _ in range(3):
        with suppress(Exception):
            return start()
    return start()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Ray and Serve on this machine; gives a folder for what routers write."""
    os.environ |= {
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_worker_niceness": "0",  # by default the replicas come after all else that the machine does
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "180",
        "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "1.0",
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    }
    ray = pytest.importorskip("ray", reason=NO_RAY)
    from ray import serve

    # "local": without an address, another Ray of this machine would be joined, and asked for its replicas.
    own = started(lambda: ray.init("local", num_cpus=8, include_dashboard=True, log_to_driver=False))
    os.environ["RAY_DASHBOARD"] = own.dashboard_url
    serve.start(http_options={"host": "127.0.0.1", "port": 8123})
    yield tmp_path_factory.mktemp("decisions")
    serve.shutdown()
    ray.shutdown()
