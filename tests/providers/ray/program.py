"""A Ray program with routed calls; prints what it saw: `python -m tests.providers.ray.program RAY FOLDER GATEWAY`."""

import json
import os
import sys
import time

import ray
from ray._private.state import state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from swarmx.compat.ray import routed

FOLDER, GATEWAY = sys.argv[2:]


@routed(kind="report", log_dir=FOLDER, log_url=GATEWAY)
@ray.remote(num_cpus=0.2)
def square(number: int) -> int:
    return number * number


@routed(kind="report")
@ray.remote(num_cpus=0, resources={"slots": 0.1})
def node() -> str:
    return str(ray.get_runtime_context().get_node_id())


@ray.remote(num_cpus=0.2)
class Worker:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def work(self, size: int) -> int:
        time.sleep(self.seconds * size)
        return os.getpid()

    def fail(self) -> None:
        raise ValueError("as it is")

    def die(self) -> None:
        os._exit(1)


@ray.remote(num_cpus=0)
def nested(function: object) -> int:
    return int(ray.get(function.remote(4)))  # type: ignore[attr-defined]


def error_of(ref: object) -> str:
    try:
        ray.get(ref)
    except Exception as error:
        return type(getattr(error, "cause", None) or error).__name__
    return ""


def settled(pool: object) -> dict[str, int]:
    """The calls at each place, once the ends of all have been heard."""
    for _ in range(600):
        counts: dict[str, int] = pool.desk.in_flight()  # type: ignore[attr-defined]
        if not any(counts.values()):
            break
        time.sleep(0.05)
    return counts


def main() -> None:
    ray.init(address=sys.argv[1], log_to_driver=False)
    said: dict[str, object] = {}
    ref = square.remote(2)
    said["is_object_ref"] = type(ref) is ray.ObjectRef
    said["chained"] = ray.get(square.remote(2)) + 2

    actors = [Worker.remote(0.02), Worker.remote(0.2)]
    pool = routed(kind="report", log_dir=FOLDER)(actors)
    pids = ray.get([actor.work.remote(0) for actor in actors])
    answers = []
    for _ in range(15):
        answers += ray.get([pool.work.remote(1) for _ in range(4)])
    said["shares"] = [answers.count(pid) for pid in pids]
    said["error"] = error_of(pool.fail.remote())
    said["in_flight"] = settled(pool)

    leaving = state.get_draining_nodes()  # tests before this one have drained some
    here = [row for row in ray.nodes() if row["Alive"] and row["NodeID"] not in leaving]
    able = [row["NodeID"] for row in here if row["Resources"].get("slots")]
    said["able"] = able
    said["nodes"] = ray.get([node.remote() for _ in range(8)])
    said["function_stood_in"] = node.desk.stood_in
    where = NodeAffinitySchedulingStrategy(able[-1], soft=False)
    said["pinned_to"], said["pinned"] = able[-1], ray.get(node.options(scheduling_strategy=where).remote())
    said["nested"] = ray.get(nested.remote(square))

    said["lost"] = error_of(actors[0].die.remote())
    said["lost"] = error_of(pool.work.remote(0)) or said["lost"]  # it may be sent there once more
    settled(pool)
    said["after_loss"] = ray.get([pool.work.remote(0) for _ in range(4)])
    said["after_loss_expected"] = [pids[1]] * 4

    square.desk._chooser.send = None  # whoever calls this fails
    said["stood_in_answers"] = ray.get([square.remote(number) for number in (1, 2, 3)])
    said["stood_in"] = square.desk.stood_in
    square.desk.close()
    pool.desk.close()
    node.desk.close()
    ray.shutdown()
    print(json.dumps(said))


if __name__ == "__main__":
    main()
