"""One node of Ray that wants the token in RAY_AUTH_TOKEN, until standard input ends; prints its address."""

import os
import sys

from tests.providers.ray.conftest import first_node

os.environ |= {"RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1"}


def main() -> None:
    from ray.cluster_utils import Cluster

    cluster = first_node(Cluster, cpus=2)
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
