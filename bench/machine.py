"""What the numbers of a benchmark were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path


def machine(packages: Sequence[str], remark: str = "") -> list[str]:
    """Processor, system and load (with a remark behind it), and the versions of `packages`."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    installed = {
        d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()
    }
    versions = [f"{name} {installed.get(name, '(not installed)')}" for name in packages]
    return [
        f"Machine: {model}, {os.cpu_count()} cores, {platform.system()} {platform.release()}; "
        f"load {os.getloadavg()[0]:.1f} before the run{remark}.",
        f"Python {platform.python_version()}, {', '.join(versions)}.",
    ]
