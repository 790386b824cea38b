"""Law 17 over all verbs: kills, full disks, folders that cannot be written, inputs that change.

Whatever happens, an output is whole or absent, inputs are as they were, and the next run clears away
what the last one left.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import parts
import test_pipeline
from lexigraft import LexigraftError, graft, learn, merge, run
from lexigraft.steps.check import mend
from test_check_gallery import Ground, source, vocab_size_raised_by_hand  # noqa: F401

KILLS = [*range(6), *(pytest.param(n, marks=pytest.mark.matrix) for n in range(6, 200))]
VERBS = ("learn", "graft", "merge", "check --fix", "train")
PARTS = ("split", "extract", "align", "prune")

# A verb in a process of its own, and what ends it: at the N-th event of the file system (an open, a
# rename, a removal), which spreads kills evenly over its work however fast the machine is.
CHILD = """
import json, os, signal, sys
verb, arguments, event = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
if verb in ("merge", "train"):
    import torch
    torch.set_num_threads(1)
from lexigraft.console import set_quiet
set_quiet(True)
if verb == "check --fix":
    from lexigraft.steps.check import mend as call
else:
    import lexigraft
    call = getattr(lexigraft, verb)
seen = 0
def count(name, given):
    global seen
    if event >= 0 and name in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile"):
        seen += 1
        if seen == event:
            os.kill(os.getpid(), signal.SIGKILL)
def limit(size):
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.addaudithook(count)
if event < -1:
    limit(-event)
from lexigraft import LexigraftError
try:
    call(*arguments[0], **arguments[1])
except LexigraftError as fault:
    print(json.dumps({"found": fault.found, "fix": fault.fix}), file=sys.stderr)
    sys.exit(2)
print(seen)
"""


@pytest.fixture(scope="module")
def place(source, tmp_path_factory) -> Path:  # noqa: F811
    """Inputs of every verb."""
    place = tmp_path_factory.mktemp("crashes") / "in"
    shutil.copytree(source, place)
    (place / "corpus.txt").write_text(parts.corpus_text(documents=6))
    vocab_size_raised_by_hand(Ground(place, place.parent / "odd"))
    corpus, learned = [place / "corpus.txt"], place / "learned"
    learn(place / "sp", corpus=corpus, tokens="6", min_count=2, output=learned)
    graft(place / "sp", learned, output=place / "grafted", pad_to=8)
    return place


def asked(verb: str, place: Path, output: Path) -> tuple[list[str], dict]:
    """Arguments of a verb on the inputs."""
    corpus = {"corpus": [str(place / "corpus.txt")], "output": str(output)}
    return {
        "learn": ([str(place / "sp")], {**corpus, "tokens": "6", "min_count": 2}),
        "graft": ([str(place / "sp"), str(place / "vocab")], {"output": str(output)}),
        "merge": ([str(place / "sp"), [str(place / "adapter")]], {"output": str(output)}),
        "split": ([str(place / "sp"), str(place / "adapter")], {"output": output.name}),
        "extract": (
            [str(place / "model")],
            {"base": str(place / "base"), "rank": 2, "output": str(output)},
        ),
        "align": ([[str(place / "base"), str(place / "model")]], {"output": str(output)}),
        "prune": ([str(place / "base")], {**corpus, "drop": "2%", "min_count": 1000}),
        "check --fix": ([str(place.parent / "odd" / "base")], {"output": str(output)}),
        "train": ([str(place / "grafted")], {**corpus, "max_steps": 2, "block_size": 32}),
    }[verb]


def start(verb: str, place: Path, output: Path, event: int) -> subprocess.Popen[str]:
    given = json.dumps(asked(verb, place, output))
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, verb, given, str(event)],
        cwd=output.parent if verb == "split" else None,  # which writes the name that it was given
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def done(verb: str, place: Path, output: Path, event: int = -1) -> tuple[int, str, str]:
    child = start(verb, place, output, event)
    told, errors = child.communicate(timeout=600)
    return child.returncode, told, errors


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def lasting(folder: Path) -> dict[str, bytes]:
    """What two equal runs agree on: all but logs of times."""
    return test_pipeline.contents(folder)


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory) -> Callable[[str], tuple[dict[str, bytes], int]]:
    """What a verb writes when it is let alone, and how many events it takes; done once each."""
    known: dict[str, tuple[dict[str, bytes], int]] = {}

    def of(verb: str) -> tuple[dict[str, bytes], int]:
        if verb not in known:
            output = tmp_path_factory.mktemp("whole") / "out"
            # An event that never comes: they are counted.
            status, told, errors = done(verb, place, output, 10**9)
            assert status == 0, errors
            known[verb] = (lasting(output), int(told.split()[-1]))
        return known[verb]

    return of


@pytest.mark.parametrize("number", KILLS)
def test_kills_at_any_moment_leave_whole_outputs_or_none(place, whole, tmp_path, number):
    """SIGKILL at a random event; then what is there, and what the next run makes of it."""
    verb = VERBS[number % 4] if number < 12 else (*VERBS, *PARTS)[number % 9]
    expected, events = whole(verb)
    event = random.Random(number).randrange(max(1, events // 3), events + 1)
    before, output = contents(place), tmp_path / "out"
    status, _, errors = done(verb, place, output, event)
    assert status in (-signal.SIGKILL, 0), errors
    assert contents(place) == before
    left = {path.name for path in tmp_path.iterdir()}
    assert all(name == "out" or name.startswith("out.partial") for name in left), left
    if output.exists():
        assert lasting(output) == expected
        return
    status, _, errors = done(verb, place, output)
    if verb == "train" and status == 2:  # it says that an unfinished training is there
        assert "--resume" in errors
        shutil.rmtree(tmp_path / "out.partial")
        status, _, errors = done(verb, place, output)
    assert status == 0, errors
    assert lasting(output) == expected
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_second_kill_while_an_output_is_replaced_loses_nothing(place, whole, tmp_path):
    """With force the old output is moved aside, then deleted: one of the two is always there."""
    output = tmp_path / "out"
    graft(place / "sp", place / "vocab", output=output)
    old = contents(output)
    _, events = whole("graft")
    positional, options = asked("graft", place, output)
    for event in range(events - 6, events + 8, 2):
        given = json.dumps([positional, {**options, "force": True, "init": "mean"}])
        subprocess.run(
            [sys.executable, "-c", CHILD, "graft", given, str(event)],
            capture_output=True,
            check=False,
        )
        kept = [p for p in tmp_path.iterdir() if p.name == "out" or p.name.startswith("out.old-")]
        assert any(contents(p).keys() == old.keys() for p in kept), (
            event,
            list(tmp_path.iterdir()),
        )


@pytest.mark.parametrize(
    "verb", [*VERBS[:4], *(pytest.param(verb, marks=pytest.mark.matrix) for verb in PARTS)]
)
def test_a_full_disk_is_one_message_and_nothing_is_left(place, tmp_path, verb):
    """Files of this process may have 20,000 bytes: what a full quota does (EFBIG, as ENOSPC)."""
    before = contents(place)
    limit = 2_000 if verb in ("learn", "extract") else 20_000
    status, _, errors = done(verb, place, tmp_path / "out", -limit)
    assert status == 2, errors
    assert "full" in errors and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
    assert contents(place) == before


@pytest.mark.matrix
@pytest.mark.parametrize("verb", ["learn", "graft", "merge", "check --fix"])
def test_a_small_disk_is_one_message_and_nothing_is_left(place, tmp_path, verb):
    """A real file system of 24 kB or so."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24k", "none", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs more rights")
    try:
        status, _, errors = done(verb, place, disk / "out")
        assert status == 2 and ("full" in errors or "GB free" in errors), errors
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_that_may_not_be_written_is_one_message(place, tmp_path, verb):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    status, _, errors = done(verb, place, closed / "out")
    assert status == 2 and "Traceback" not in errors and "-o" in errors


@pytest.mark.parametrize("verb", VERBS)
def test_an_output_below_a_file_is_one_message(place, tmp_path, verb):
    """What is refused to everyone, the superuser too: no folder can be made there."""
    (tmp_path / "file").write_text("kept")
    status, _, errors = done(verb, place, tmp_path / "file" / "out")
    assert status == 2 and "Traceback" not in errors, errors
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("verb", ["graft", "merge", "check --fix"])
def test_weights_that_change_while_they_are_read(place, tmp_path, verb):
    """Cut off under the hands of a verb: one clear message, and no output of half of them."""
    ground = Ground(place, tmp_path / "in")
    base, output = ground.sp, tmp_path / "out"
    if verb == "check --fix":
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "vocab_size": 7}))
    weights = base / "model.safetensors"

    def cut(name: str, given: tuple) -> None:
        if armed and name == "os.mkdir" and "out.partial-" in str(given[0]):
            with weights.open("r+b") as stream:
                stream.truncate(3_000)

    armed = [True]
    sys.addaudithook(cut)
    try:
        with pytest.raises(LexigraftError) as fault:
            if verb == "graft":
                graft(base, ground.copy("vocab"), output=output)
            elif verb == "merge":
                merge(base, [ground.adapter], output=output)
            else:
                mend(base, output)
    finally:
        armed.clear()
    assert fault.value.fix
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("out")] == []


# tests/test_pipeline.py kills a run once in the suite that is always run.
@pytest.mark.matrix
@pytest.mark.parametrize("moment", [1, 3, 5])
def test_a_run_that_was_killed_resumes_to_the_same_bytes(tmp_path_factory, moment):
    """Killed when so many of its stages were begun: the next run ends where a whole one ends."""
    project = tmp_path_factory.mktemp("run")
    test_pipeline.write_inputs(project)
    recipe = project / "recipe.yaml"
    recipe.write_text(test_pipeline.RECIPE.format(steps=3) + "control: false\n")
    run(recipe, output=project / "whole")
    killed = project / "killed"
    child = subprocess.Popen(
        [sys.executable, "-m", "lexigraft", "run", str(recipe), "-o", str(killed)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while child.poll() is None and time.monotonic() < deadline:
        state = killed / "run.json"
        if state.exists():
            stages = json.loads(state.read_text())
            if len(stages["stages"]) + bool(stages["running"]) >= moment:
                break
        time.sleep(0.02)
    child.kill()
    child.wait()
    run(recipe, output=killed)
    for name in ("vocab", "model", "adapter", "merged"):
        assert lasting(killed / name) == lasting(project / "whole" / name), name
    assert not list(killed.glob("*.partial-*"))
