"""A Ray cluster of several nodes on this machine; each can be killed, added, and cut off from the others.

Where root may make namespaces, every node has a network of its own (10.77.0.0/24), wired to the head's, inside one process
namespace: when its first process ends, and it ends with the tests, the kernel ends everything else and takes the networks down.
Elsewhere the nodes share the loopback device, and none can be cut off. Nodes have the dependencies, not this repository.
"""

import contextlib
import os
import secrets
import shutil
import site
import socket
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import folders
import psutil

ROOT = Path(__file__).parents[2]
_HOLDER = str(Path(__file__).with_name("holder.py"))
_MARK = "MATRYOSHKA_TEST_NODES"
_IS_UP = "Ray runtime started"
_PATIENCE_SECONDS = 300
# A node that does not answer is given up after five pings of two seconds, whoever waits for it learns that from its connection
# within fifteen, and nothing waits longer for a head that is gone.
_CHECKS = {
    "health_check_initial_delay": 1_000,
    "health_check_period": 1_000,
    "health_check_timeout": 2_000,
    "grpc_client_keepalive_time": 5_000,
    "grpc_client_keepalive_timeout": 10_000,
}
_SETTINGS = {**{f"RAY_{name}_ms": str(value) for name, value in _CHECKS.items()}, "RAY_gcs_rpc_server_reconnect_timeout_s": "10"}


def wait_until(holds: Callable[[], bool]) -> None:
    """Returns once a condition holds, or fails after five minutes: a cluster on a busy machine takes its time."""
    folders.wait_until(holds, _PATIENCE_SECONDS, pause=0.1)


class _Wires(Protocol):
    """How nodes are reached.

    Attributes:
        why_no_cuts: Why no node can be cut off; empty if any can.
        environment: Of every process on the nodes.
    """

    why_no_cuts: str
    environment: Mapping[str, str]

    def connect(self, number: int) -> str:
        """Gives a node an address, and returns it."""

    def enter(self, number: int) -> list[str]:
        """Returns what stands before a command that is to run on a node."""

    def port(self, usual: int) -> int:
        """Returns a port that is free on a new node."""

    def set_link(self, number: int, state: str) -> None:
        """Sets the link of a node to up or down."""

    def close(self) -> None:
        """Ends every process on the nodes."""


class _Namespaces:
    """A network namespace per node; the head's is the one of the first process, with a bridge that the others are wired to."""

    why_no_cuts = ""
    environment: Mapping[str, str] = {}

    def __init__(self) -> None:
        command = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, _HOLDER]
        self._holder = _hold(command)
        (first,) = psutil.Process(self._holder.pid).children()
        self._enter = ["nsenter", f"--target={first.pid}", "--mount", "--pid"]
        _run([*self._enter, "mkdir", "-p", "/run/netns"])
        _run([*self._enter, "mount", "-t", "tmpfs", "none", "/run/netns"])
        self._configure("link set lo up", "link add hub type bridge", "address add 10.77.0.1/24 dev hub", "link set hub up")

    def connect(self, number: int) -> str:
        address = f"10.77.0.{number + 1}"
        if number:
            _run([*self._enter, "ip", "netns", "add", f"node{number}"])
            self._configure(f"link add link{number} type veth peer name eth0 netns node{number}")
            self._configure(f"link set link{number} master hub up")
            inside = ["link set lo up", f"address add {address}/24 dev eth0", "link set eth0 up"]
            self._configure(*inside, options=("-netns", f"node{number}"))
        return address

    def enter(self, number: int) -> list[str]:
        return [*self._enter, "ip", "netns", "exec", f"node{number}"] if number else [*self._enter, "--net"]

    def port(self, usual: int) -> int:
        return usual

    def set_link(self, number: int, state: str) -> None:
        self._configure(f"link set link{number} {state}")

    def close(self) -> None:
        _release(self._holder)

    def _configure(self, *lines: str, options: Sequence[str] = ()) -> None:
        _run([*self._enter, "--net", "ip", *options, "-batch", "-"], "\n".join(lines))


class _Loopback:
    """All nodes on the loopback device; their processes are known by a mark in their environment."""

    def __init__(self, why: str) -> None:
        self.why_no_cuts = f"network namespaces cannot be made here: {why}"
        self.environment = {_MARK: secrets.token_hex(8)}
        self._holder = _hold([sys.executable, _HOLDER, _MARK, self.environment[_MARK]])

    def connect(self, _number: int) -> str:
        return "127.0.0.1"

    def enter(self, _number: int) -> list[str]:
        return []

    def port(self, _usual: int) -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            return port

    def set_link(self, number: int, state: str) -> None:
        raise NotImplementedError(f"node {number} {state}: {self.why_no_cuts}")

    def close(self) -> None:
        _release(self._holder)


def _hold(command: Sequence[str]) -> subprocess.Popen[str]:
    """Starts the process that everything ends with, and returns it when it is there.

    Raises:
        OSError: It cannot be started.
    """
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert holder.stdout
    assert holder.stderr
    if not holder.stdout.readline():
        raise OSError(holder.stderr.read().strip())
    return holder


def _release(holder: subprocess.Popen[str]) -> None:
    with holder:
        assert holder.stdin
        holder.stdin.close()


def _run(command: Sequence[str], text: str = "") -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


@dataclass(frozen=True)
class Node:
    """One machine of the cluster, as far as the tests are concerned."""

    number: int
    name: str
    address: str
    process: subprocess.Popen[bytes]
    log: Path

    def wait(self) -> None:
        """Returns once the node belongs to the cluster."""
        wait_until(lambda: _IS_UP in self.log.read_text() or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()

    def find(self, title: str) -> list[psutil.Process]:
        """Returns the processes of the node whose title has these words."""
        return [own for own in self._family() if title in folders.title_of(own)]

    def freeze(self, title: str) -> None:
        """Has such processes do nothing more."""
        for process in self.find(title):
            process.suspend()

    def kill(self) -> None:
        """Ends every process of the node at once."""
        family = self._family()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        wait_until(lambda: not any(map(folders.title_of, family)))

    def wait_for_end(self) -> None:
        """Returns once the node has ended by itself."""
        wait_until(lambda: self.process.poll() is not None)

    def _family(self) -> list[psutil.Process]:
        try:
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


class Nodes:
    """A cluster: a head, to which nodes are added. All of it is gone when the block ends, and when the tests end in any way.

    Attributes:
        why_no_cuts: Why no node can be cut off; empty if any can.
        environment: Of what runs on a node.
        python: The interpreter of the nodes.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: paths of sockets are
        try:
            self._wires: _Wires = _Namespaces()
        except OSError as error:
            self._wires = _Loopback(str(error))
        self.why_no_cuts = self._wires.why_no_cuts
        self.python = _bare_python(self._folder / "python")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHON"))},
            **_SETTINGS,
            **self._wires.environment,
            "PATH": f"{Path(self.python).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_memory_monitor_refresh_ms": "0",
        }
        self._nodes: list[Node] = []
        port, dashboard = self._wires.port(6379), self._wires.port(8265)
        self.head = self._start("--head", f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}")
        self.head.wait()
        self.environment |= {"RAY_ADDRESS": f"{self.head.address}:{port}"}
        self.dashboard = f"http://127.0.0.1:{dashboard}"

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *_: object) -> None:
        self._wires.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, *num_cpus: int) -> list[Node]:
        """Adds nodes with so many CPUs each, and returns them when they are there."""
        added = [self._start(f"--address={self.environment['RAY_ADDRESS']}", num_cpus=own) for own in num_cpus]
        for node in added:
            node.wait()
        return added

    @property
    def alive(self) -> list[Node]:
        """The nodes that have not ended, cut off or not, the oldest first."""
        return [node for node in self._nodes if node.process.poll() is None]

    def cut_off(self, node: Node) -> None:
        """Takes the link of a node down: it and the others cannot reach each other, and nobody is told."""
        self._wires.set_link(node.number, "down")

    def reconnect(self, node: Node) -> None:
        """Brings the link of a node back."""
        self._wires.set_link(node.number, "up")

    def run(self, command: Sequence[str], folder: Path = Path("/"), **options: Any) -> subprocess.Popen[str]:
        """Starts a command on the head, in a folder."""
        options = {"env": self.environment, "text": True, **options}
        return subprocess.Popen([*self._wires.enter(0), "env", f"--chdir={folder}", *command], **options)

    def _start(self, *flags: str, num_cpus: int = 1) -> Node:
        number = len(self._nodes)
        address, folder = self._wires.connect(number), self._folder / str(number)
        folder.mkdir()
        own = {
            "node-name": f"node{number}",
            "node-ip-address": address,
            "num-cpus": num_cpus,
            "object-store-memory": 100_000_000,
            "temp-dir": folder,
            "dashboard-agent-listen-port": self._wires.port(52365),
        }
        ray = [self.python, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        command = [*self._wires.enter(number), "env", "--chdir=/", *ray, *flags]
        log = folder / "log.txt"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [*command, *(f"--{name}={value}" for name, value in own.items())], stdout=sink, stderr=sink, env=self.environment
            )
        self._nodes.append(Node(number, f"node{number}", address, process, log))
        return self._nodes[-1]


def _bare_python(folder: Path) -> str:
    """Returns an interpreter that has the packages of this one; what is installed as a link to its sources is not there."""
    venv.create(folder, symlinks=True)
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "packages.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return str(folder / "bin" / "python")
