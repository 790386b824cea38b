"""Several processes on one machine, as users start them."""

import os
import socket
import subprocess
import sys


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def launched(*arguments: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """`accelerate launch --multi_gpu -m lexigraft ...`: the launcher of many processes.

    Its `--cpu` starts a single one unless there is an mpirun. What runs in them chooses CPU and
    gloo where there is no GPU.
    """
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"),
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
    assert done.returncode == 0, done.stderr[-3000:]
