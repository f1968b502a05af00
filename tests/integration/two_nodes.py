"""Two Ray nodes on this machine until standard input ends; prints the cluster's address, and the second node's raylet."""

import json
import sys

from ray.cluster_utils import Cluster


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    raylet = second.all_processes["raylet"][0].process.pid
    sys.stdout.write(json.dumps({"address": cluster.address, "raylet": raylet}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
