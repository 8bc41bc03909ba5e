"""A real cluster on loopback: an assigner node, tasks of the sample service, and the command line, each a process of the binary."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

REPOSITORY = Path(__file__).resolve().parents[3]

#: Far beyond what anything here takes on a busy machine.
PATIENCE = 60.0

#: Between two looks at something that cannot wake us: another process.
PAUSE = 0.02


def binary(variable: str, path: str) -> str:
    """Finds a program that was built before."""
    if given := os.environ.get(variable):
        return given
    target = Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target"))
    built = [target / profile / path for profile in ("release", "debug")]
    built = [program for program in built if program.exists()]
    if not built:
        raise FileNotFoundError(f"{path} is not built: `cargo build`, or set {variable}")
    return str(max(built, key=lambda program: program.stat().st_mtime))


def until(what: str, look: Callable[[], Any]) -> Any:
    """Waits until something is there."""
    deadline = time.monotonic() + PATIENCE
    while not (found := look()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {PATIENCE:.0f} s for {what}")
        time.sleep(PAUSE)
    return found


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


class Cluster:
    """One assigner node. Everything that was started is killed with it.

    `node` is what the node is started with beside the usual, `caller` what the command line needs to reach it.
    """

    def __init__(self, node: Sequence[str] = (), caller: Sequence[str] = ()) -> None:
        self._node, self._caller = node, caller
        self._program = binary("MANDOLINE_BIN", "mandoline")
        self._data = tempfile.TemporaryDirectory()
        self._processes: list[subprocess.Popen[bytes]] = []
        self.port, self._peer = free_ports(2)
        self.assigner = f"127.0.0.1:{self.port}"
        self.start_node()

    def start_node(self) -> subprocess.Popen[bytes]:
        """Starts the node, with what it has on disk."""
        peer = f"127.0.0.1:{self._peer}"
        known = ["--init"] if not any(Path(self._data.name).iterdir()) else []
        where = ["--data-dir", self._data.name, "--listen", self.assigner, "--peer-listen", peer]
        self.node = self.start("assigner", *known, *where, *self._node)
        until("the node to be ready", self._is_ready)
        return self.node

    def _is_ready(self) -> bool:
        command = [self._program, "status", "--assigners", self.assigner, *self._caller]
        return subprocess.run(command, capture_output=True, timeout=PATIENCE).returncode == 0

    def start(self, *args: str) -> subprocess.Popen[bytes]:
        usual = {name: value for name, value in os.environ.items() if not name.startswith("MANDOLINE_")}
        none = subprocess.DEVNULL
        process = subprocess.Popen([self._program, *args], env=usual, stdin=none, stdout=none, stderr=none)
        self._processes.append(process)
        return process

    def run(self, *args: str, text: Optional[str] = None) -> str:
        """Runs a command to its good end, and gives what it printed."""
        command = [self._program, *args, "--assigners", self.assigner, *self._caller]
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=PATIENCE)
        if done.returncode != 0:
            raise AssertionError(f"{command}: {done.stderr}")
        return done.stdout

    def make_job(self, name: str, more: str = "heartbeat: 5s\n") -> None:
        """Makes a job whose tasks are not taken for lost just because the machine is busy."""
        spec = "report_every: 500ms\nbalance_every: 1s\n"
        self.run("job", "apply", "-", text=f"name: {name}\n{spec}{more}")

    def shown(self, job: str) -> dict[str, Any]:
        """The job's assignment."""
        shown: dict[str, Any] = json.loads(self.run("assignment", "show", job, "-o", "json"))
        return shown

    def demo_task(self, job: str, name: str) -> subprocess.Popen[bytes]:
        listen = ["--listen", "127.0.0.1:0", "--assigners", self.assigner]
        return self.start("demo", "task", "--job", job, "--name", name, *listen)

    def serve(self, job: str, tasks: set[str]) -> dict[str, Any]:
        """Waits until these tasks and no others serve the job, all of it."""

        def look() -> Optional[dict[str, Any]]:
            shown = self.shown(job)
            serving = [{replica["task"] for replica in slice["replicas"]} for slice in shown["slices"]]
            return shown if all(serving) and set.union(*serving) == tasks else None

        found: dict[str, Any] = until(f"{sorted(tasks)} to serve {job}", look)
        return found

    def close(self) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGKILL)
        for process in self._processes:
            process.wait()
        self._data.cleanup()
