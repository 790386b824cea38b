"""Several processes on one machine, as users start them, and servers for them."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lexigraft.models.unfinished import last_checkpoint, partial_of


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def peak_megabytes(code: str, *arguments: object) -> float:
    """The most memory that a process which runs `code` has had at a time."""
    code += "; import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    # A shell between us and the child: Linux hands a parent's peak down to its children.
    done = subprocess.run(["sh", "-c", '"$@"', "sh", *command], capture_output=True, check=True)
    return int(done.stdout.split()[-1]) / (2**20 if sys.platform == "darwin" else 2**10)


class Silent:
    """What makes a handler of requests print nothing."""

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve_locally(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server of this machine alone, in a thread; yields its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def on_a_terminal(command: list[str], stream: str, **variables: str) -> tuple[str, str]:
    """What `command` writes to `stream` (stdout or stderr), a pseudo-terminal, and to the other."""
    pty = pytest.importorskip("pty", reason="no pseudo-terminals here")
    ours, theirs = pty.openpty()
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: theirs}
    known = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    given = {**known, "TERM": "xterm", "COLUMNS": "120", **variables}
    with subprocess.Popen(command, env=given, **streams) as child:
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # how a pseudo-terminal ends
            while data := os.read(ours, 65_536):
                shown += data
        other = (child.stdout or child.stderr).read().decode()
    os.close(ours)
    assert child.returncode == 0, other
    return shown.decode(), other


def launched(
    *arguments: object, processes: int = 2, way: tuple[str, ...] = ("--multi_gpu",)
) -> subprocess.CompletedProcess[str]:
    """`accelerate launch WAY -m lexigraft ...`: the launcher of many processes.

    Its `--cpu` starts a single one unless there is an mpirun. What runs in them chooses CPU and
    gloo where there is no GPU.
    """
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", *way, "--num_machines", "1"),
        *("--num_processes", processes, "--num_cpu_threads_per_process", 1),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", free_port()),
        *("-m", "lexigraft", *arguments),
    ]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment(), check=False
    )


def torchrun(script: object, *arguments: object, processes: int = 2) -> None:
    """A script in processes that torch itself starts; it must end well."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes),
        *("--master_port", free_port(), script, *arguments),
    ]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr  # of which process is the first to fail


def killed_after_a_checkpoint(model, corpus, output, options) -> None:
    """`train` in a process of its own, killed as soon as it has saved; there is no output then."""
    command = (
        "import torch; torch.set_num_threads(1); from lexigraft import train; "
        f"train({str(model)!r}, corpus=[{str(corpus)!r}], output={str(output)!r}, **{options!r})"
    )
    child = subprocess.Popen([sys.executable, "-c", command], stderr=subprocess.DEVNULL)
    while child.poll() is None and last_checkpoint(partial_of(output)) is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not output.exists() and last_checkpoint(partial_of(output)) is not None
