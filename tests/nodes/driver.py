"""A driver on the head of a cluster: runs jobs one after the other, and stops at stated moments until it is told to go on."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nodes
import progress
import pytest

if TYPE_CHECKING:
    from jobs.cluster import Session


class Driver:
    """What tests see of the driver.

    Args:
        cluster: Where to.
        log: What the jobs say goes there.
    """

    def __init__(self, cluster: nodes.Nodes, log: Path) -> None:
        self.log = log
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        environment = {**cluster.environment, "PYTHONPATH": f"{nodes.ROOT}:{nodes.ROOT / 'tests'}"}
        with log.open("wb") as sink:
            self.process = cluster.run([cluster.python, __file__], env=environment, stderr=sink, **pipes)

    def start(self, job: str, *stops: int, **settings: Any) -> None:
        """Starts a job, which is to stop when so many parts are done."""
        self._send(job=job, settings={name: str(value) for name, value in settings.items()}, stops=stops)

    def wait_for(self, stop: int) -> None:
        """Returns once the job has stopped there."""
        assert self._receive() == {"stopped": stop}, self.log.read_text()

    def go_on(self) -> None:
        """Has the job go on."""
        self._send()

    def finish(self) -> None:
        """Returns once the job is done."""
        assert self._receive() == {"ended": 0}, self.log.read_text()

    def run(self, job: str, **settings: Any) -> None:
        """Runs a job to its end."""
        self.start(job, **settings)
        self.finish()

    def names(self, task: str = "") -> set[str]:
        """Returns the names of the nodes that are there, or of those that a task ran on. The driver must not be running."""
        self._send(task=task)
        return set(self._receive()["nodes"])

    def close(self) -> None:
        """Ends the driver."""
        with self.process:
            assert self.process.stdin
            self.process.stdin.close()

    def _send(self, **message: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def _receive(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        return json.loads(line)


class _Served:
    """The driver itself, whose jobs share one connection to the cluster."""

    def __init__(self, session: "Session") -> None:
        self._session = session
        self._replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def serve(self) -> None:
        """Does what is asked for, until the end, or until it is told to go on."""
        while message := json.loads(sys.stdin.readline() or "{}"):
            if "job" in message:
                self._reply(ended=self._run(**message))
            else:
                self._reply(nodes=_find_nodes(message["task"]))

    def _reply(self, **message: Any) -> None:
        self._replies.write(json.dumps(message) + "\n")
        self._replies.flush()

    def _run(self, job: str, settings: dict[str, Any], stops: list[int]) -> int:
        from jobs.entry import main

        room = importlib.import_module(f"jobs.{job}")
        sys.argv = [job, *(f"--{name.replace('_', '-')}={value}" for name, value in settings.items())]
        with pytest.MonkeyPatch.context() as patch:
            progress.interrupt(patch, {stop: lambda own=stop: self._stop(own) for stop in stops})
            with pytest.raises(SystemExit) as ended:
                main(job, room.Settings, room.run)
        self._session.release()  # as a driver that ends would: its encoders would keep their CPUs from whatever comes next
        return int(str(ended.value.code))

    def _stop(self, stop: int) -> None:
        self._reply(stopped=stop)
        self.serve()


def _find_nodes(task: str) -> list[str]:
    import ray
    from ray.util.state import list_tasks

    names = {node["NodeID"]: node["NodeName"] for node in ray.nodes() if node["Alive"] or task}
    if not task:
        return list(names.values())
    return list({names[own.node_id] for own in list_tasks(filters=[("name", "=", task)], limit=1_000) if own.node_id})


def main() -> None:
    from jobs import cluster

    with cluster.connected() as session:
        _Served(session).serve()


if __name__ == "__main__":
    main()
