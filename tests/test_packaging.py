"""What is published: the wheel's content, one version, the workflow, and completion in a shell."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import yaml

from lexigraft import __version__

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "lexigraft"
BUILD = """
import sys
from hatchling import build
print(getattr(build, f"build_{sys.argv[1]}")(sys.argv[2]))
"""


def built(kind, folder):
    """A wheel or sdist, made by the build backend that pyproject.toml names."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed (dependency group `dev`)")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(folder)],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    return folder / done.stdout.split()[-1]


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    wheel = zipfile.ZipFile(built("wheel", tmp_path))
    names = set(wheel.namelist())
    info = f"lexigraft-{__version__}.dist-info"
    files = {
        f"lexigraft/{path.relative_to(SOURCE).as_posix()}"
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if not name.startswith(f"{info}/")} == files
    assert {"lexigraft/py.typed", "lexigraft/checkpoints/architectures.json"} <= files
    assert {"lexigraft/data/general.txt", "lexigraft/reporting/page.js"} <= files
    assert f"{info}/licenses/LICENSE" in names
    assert "lexigraft = lexigraft.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    told = message_from_string(wheel.read(f"{info}/METADATA").decode())
    assert (told["Version"], told["License-Expression"]) == (__version__, "Apache-2.0")
    assert set(told.get_all("Provides-Extra")) == {
        "deepspeed", "demo", "gguf", "quantised", "ray", "tasks",
    }  # fmt: skip
    assert "make demo" in told.get_payload()  # the README is the page of the project
    explained = (ROOT / "docs" / "dependencies.md").read_text()
    assert all(f"| `{extra}` |" in explained for extra in told.get_all("Provides-Extra"))


def test_the_source_archive_can_be_tested_and_holds_no_results(tmp_path):
    with tarfile.open(built("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"tests/parts.py", "Makefile", "docs/laws.md", "scripts/make_architectures.py"} <= names
    assert {"bench/learn.py", "LICENSE", "CHANGELOG.md", "src/lexigraft/py.typed"} <= names
    assert not [name for name in names if re.match(r"(runs|bench/results|\.venv|dist)/", name)]


def test_the_version_has_one_place():
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project and __version__ not in project
    places = [path for path in SOURCE.rglob("*.py") if f'"{__version__}"' in path.read_text()]
    assert places == [SOURCE / "__init__.py"]
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## (\S+)", changes, re.MULTILINE)[1] == __version__


def test_the_workflow_runs_what_contributors_run():
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step for job in flow["jobs"].values() for step in job["steps"]]
    commands = " ".join(step.get("run", "") for step in steps)
    assert all(f"make {name}" in commands for name in ("lint", "test", "docs"))
    assert "python -m build" in commands and "twine check" in commands
    assert "python tests/installed.py" in commands  # the README's lines, from the wheel
    used = [step["uses"] for step in steps if "uses" in step]
    assert used and all(re.fullmatch(r"[\w/-]+@v\d+\.\d+\.\d+", action) for action in used)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make (\w+)", commands)) <= targets
    pythons = flow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text()
    assert pythons[0] == "3.10"


def test_the_workflow_runs_every_test_each_week_and_keeps_what_it_saw():
    """Matrix, browser and notebooks too: what these need is installed, and nothing is skipped."""
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    starts = flow[True]  # YAML 1.1 reads the key `on` so
    assert len(starts["schedule"]) == 1 and "workflow_dispatch" in starts
    assert re.fullmatch(r"\d+ \d+ \* \* \d", starts["schedule"][0]["cron"])
    job = flow["jobs"]["everything"]
    assert all(name in job["if"] for name in ("schedule", "workflow_dispatch"))
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands[-1] == "make test-all"
    installed = " ".join(commands[:-1])
    assert all(name in installed for name in ("playwright==", "nbclient==", "ipykernel=="))
    assert "playwright install --with-deps chromium" in installed
    kept = next(s for s in job["steps"] if "upload-artifact" in s.get("uses", ""))
    assert kept["if"] == "always()"
    paths = kept["with"]["path"].split()
    assert job["env"]["LEXIGRAFT_SCREENSHOTS"].endswith(paths[0])
    assert job["env"]["PYTEST_ADDOPTS"] == f"--junitxml={paths[1]}"


def test_a_shell_completes_verbs_and_options():
    command = Path(sysconfig.get_path("scripts")) / "lexigraft"
    if not command.exists():
        pytest.skip("the package is not installed here")

    def completed(line):
        words = shlex.split(line)
        settings = {
            "_LEXIGRAFT_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) - 1),
        }
        done = subprocess.run(
            [command], capture_output=True, text=True, env={**os.environ, **settings}, check=False
        )
        return done.stdout.split()

    assert completed("lexigraft up") == ["upload"]
    assert "--tasks" in completed("lexigraft eval --ta")
    shown = subprocess.run(
        [command], capture_output=True, text=True, check=False,
        env={**os.environ, "_LEXIGRAFT_COMPLETE": "source_bash"},
    )  # fmt: skip
    assert "complete" in shown.stdout and "_LEXIGRAFT_COMPLETE=complete_bash" in shown.stdout


@pytest.mark.matrix
def test_an_installed_wheel_runs_the_readme_s_commands(tmp_path):
    """In an empty environment that sees this one's dependencies, outside the repository."""
    wheel = built("wheel", tmp_path)
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps",
         "--no-index", wheel], check=True,
    )  # fmt: skip
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(
        [python, ROOT / "tests" / "installed.py", tmp_path], check=True, cwd=tmp_path, env=clean
    )
