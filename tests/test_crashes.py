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

import lexigraft
import parts
import test_pipeline
from lexigraft import LexigraftError, graft, learn, run
from lexigraft.files import Inputs
from lexigraft.stages import require_run_folder
from lexigraft.steps.check import mend
from test_check_gallery import Ground, source, vocab_size_raised_by_hand  # noqa: F401

KILLS = [*range(6), *(pytest.param(n, marks=pytest.mark.matrix) for n in range(6, 200))]
VERBS = ("learn", "graft", "merge", "check --fix", "train")
PARTS = ("split", "extract", "align", "prune", "blend", "learn --replace")
ALL = (*VERBS, *PARTS)

# A verb in a process of its own, and what ends it: at the N-th event of the file system (an open, a
# rename, a removal), which spreads kills evenly over its work however fast the machine is.
CHILD = """
import json, os, signal, sys, time
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
    call = getattr(lexigraft, verb.split()[0])
seen = 0
def count(name, given):
    global seen
    if event >= 0 and name in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile"):
        seen += 1
        if seen == event:
            os.kill(os.getpid(), signal.SIGKILL)
def limit(size):  # the N of -N: the most bytes of a file
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def obey():  # the superuser may write only where modes allow it, without CAP_DAC_OVERRIDE
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    head, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(head, sets) == 0
    for place in (0, 1):
        sets[place] &= ~(1 << 1)
    assert libc.capset(head, sets) == 0
sys.addaudithook(count)
if event == -2 and os.geteuid() == 0:
    obey()
elif event < -1:
    limit(-event)
from lexigraft import LexigraftError
print("begun", flush=True)
began = time.monotonic()
try:
    call(*arguments[0], **arguments[1])
except LexigraftError as fault:
    print(json.dumps({"found": fault.found, "fix": fault.fix}), file=sys.stderr)
    sys.exit(2)
print(json.dumps([seen, time.monotonic() - began]))
"""
NEVER, LET_ALONE, OBEY = 10**9, -1, -2  # events: counted and never met; none; modes hold for root


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
        "learn --replace": (
            [str(place / "sp")],
            {**corpus, "general": corpus["corpus"], "replace": 4, "min_count": 2},
        ),
        "graft": ([str(place / "sp"), str(place / "vocab")], {"output": str(output)}),
        "merge": ([str(place / "sp"), [str(place / "adapter")]], {"output": str(output)}),
        "split": (
            [str(place / "sp"), str(place / "adapter")],
            {"output": str(output.relative_to(standing(output)))},
        ),
        "extract": (
            [str(place / "model")],
            {"base": str(place / "base"), "rank": 2, "output": str(output)},
        ),
        "blend": (
            [[str(place / "base"), str(place / "model")]],
            {"base": str(place / "base"), "method": "linear", "output": str(output)},
        ),
        "align": ([[str(place / "base"), str(place / "model")]], {"output": str(output)}),
        "prune": ([str(place / "base")], {**corpus, "drop": "2%", "min_count": 1000}),
        "check --fix": ([str(place.parent / "odd" / "base")], {"output": str(output)}),
        "train": ([str(place / "grafted")], {**corpus, "max_steps": 2, "block_size": 32}),
        "run": ([str(place / "recipe.yaml")], {"output": str(output)}),
    }[verb]


def standing(output: Path) -> Path:
    """The nearest folder around an output that is there."""
    return next(folder for folder in output.parents if folder.is_dir())


def start(verb: str, place: Path, output: Path, event: int) -> subprocess.Popen[str]:
    given = json.dumps(asked(verb, place, output))
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, verb, given, str(event)],
        cwd=standing(output) if verb == "split" else None,  # which writes the name it was given
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def done(verb: str, place: Path, output: Path, event: int = LET_ALONE) -> tuple[int, str, str]:
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
def whole(place, tmp_path_factory) -> Callable[[str], tuple[dict[str, bytes], int, float]]:
    """What a verb writes when it is let alone, its events and seconds; done once each."""
    known: dict[str, tuple[dict[str, bytes], int, float]] = {}

    def of(verb: str) -> tuple[dict[str, bytes], int, float]:
        if verb not in known:
            output = tmp_path_factory.mktemp("whole") / "out"
            status, told, errors = done(verb, place, output, NEVER)
            assert status == 0, errors
            known[verb] = (lasting(output), *json.loads(told.splitlines()[-1]))
        return known[verb]

    return of


@pytest.mark.parametrize("number", KILLS)
def test_kills_at_any_moment_leave_whole_outputs_or_none(place, whole, tmp_path, number):
    """SIGKILL at a random event; then what is there, and what the next run makes of it."""
    verb = VERBS[number % 4] if number < 12 else ALL[number % len(ALL)]
    expected, events, _ = whole(verb)
    event = random.Random(number).randrange(max(1, events // 3), events + 1)
    before, output = contents(place), tmp_path / "out"
    status, _, errors = done(verb, place, output, event)
    assert status in (-signal.SIGKILL, 0), errors
    assert contents(place) == before
    require_whole_or_none(verb, place, output, expected)


@pytest.mark.matrix
@pytest.mark.parametrize("number", range(20))
def test_kills_by_the_clock_leave_whole_outputs_or_none(place, whole, tmp_path, number):
    """SIGKILL at a random moment, between events too: in the middle of a write or a sum."""
    verb = ALL[number % len(ALL)]
    expected, _, seconds = whole(verb)
    before, output = contents(place), tmp_path / "out"
    child = start(verb, place, output, LET_ALONE)
    assert child.stdout.readline() == "begun\n"
    time.sleep(random.Random(number).random() * seconds)
    child.kill()
    _, errors = child.communicate(timeout=60)
    assert child.returncode in (-signal.SIGKILL, 0), errors
    assert contents(place) == before
    require_whole_or_none(verb, place, output, expected)


def require_whole_or_none(verb: str, place: Path, output: Path, expected: dict[str, bytes]) -> None:
    """After a kill the output is whole or absent, and the next run makes it whole."""
    folder = output.parent
    left = {path.name for path in folder.iterdir()}
    assert all(name == "out" or name.startswith("out.partial") for name in left), left
    if output.exists():
        assert lasting(output) == expected
        return
    status, _, errors = done(verb, place, output)
    if verb == "train" and status == 2:  # it says that an unfinished training is there
        assert "--resume" in errors
        shutil.rmtree(folder / "out.partial")
        status, _, errors = done(verb, place, output)
    assert status == 0, errors
    assert lasting(output) == expected
    assert {path.name for path in folder.iterdir()} == {"out"}


def test_a_second_kill_while_an_output_is_replaced_loses_nothing(place, whole, tmp_path):
    """With force the old output is moved aside, then deleted: one of the two is always there."""
    output = tmp_path / "out"
    graft(place / "sp", place / "vocab", output=output)
    old = contents(output)
    _, events, _ = whole("graft")
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
    "verb", [*VERBS[:4], *(pytest.param(verb, marks=pytest.mark.matrix) for verb in ALL[4:])]
)
def test_a_full_disk_is_one_message_and_nothing_is_left(place, tmp_path, verb):
    """Files of this process may have 20,000 bytes: what a full quota does (EFBIG, as ENOSPC)."""
    before = contents(place)
    limit = 2_000 if verb in ("learn", "learn --replace", "extract") else 20_000
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


@pytest.mark.skipif(
    os.geteuid() == 0 and sys.platform != "linux", reason="modes bind the superuser on Linux alone"
)
@pytest.mark.parametrize(
    "verb",
    [
        pytest.param(verb, marks=[] if verb in ("graft", "check --fix") else pytest.mark.matrix)
        for verb in ALL
    ],
)
def test_a_folder_that_may_not_be_written_is_one_message(place, tmp_path, verb):
    """Nor may the inputs: they are only read."""
    closed, before = tmp_path / "closed", contents(place)
    closed.mkdir(mode=0o500)
    status, _, errors = done(verb, place, closed / "out", OBEY)
    assert status == 2 and "Traceback" not in errors and "-o" in errors, errors
    assert list(closed.iterdir()) == []
    assert contents(place) == before


@pytest.mark.parametrize(
    "verb",
    [
        pytest.param(verb, marks=[] if verb in (*VERBS, "split", "align") else pytest.mark.matrix)
        for verb in ALL
    ],
)
def test_an_output_below_a_file_is_one_message(place, tmp_path, verb):
    """What is refused to everyone, the superuser too: no folder can be made there."""
    (tmp_path / "file").write_text("kept")
    status, _, errors = done(verb, place, tmp_path / "file" / "out")
    assert status == 2 and "Traceback" not in errors, errors
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


# Which input changes under a verb, and when: as its output is begun, or (learn) at the end, when the
# corpus has been counted and is about to be named in the manifest.
CHANGED = {
    "graft": "in/sp/model.safetensors",
    "merge": "in/adapter/adapter_model.safetensors",
    "split": "in/sp/model.safetensors",
    "extract": "in/model/model.safetensors",
    "align": "in/model/model.safetensors",
    "prune": "in/base/model.safetensors",
    "blend": "in/model/model.safetensors",
    "check --fix": "odd/base/model.safetensors",
    "learn": "in/corpus.txt",
    "train": "in/grafted/model.safetensors",
}


def cut(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.truncate(3_000)


def rewrite(path: Path) -> None:
    """Other bytes in the middle, and not one more or less."""
    middle = path.stat().st_size // 2
    with path.open("r+b") as stream:
        stream.seek(middle)
        letters = stream.read(8)
        stream.seek(middle)
        stream.write(letters[::-1] if letters[::-1] != letters else b"eeeeeeee")


@pytest.mark.parametrize(
    ("verb", "how"),
    [
        ("graft", cut),
        ("merge", cut),
        ("check --fix", cut),
        ("graft", rewrite),
        ("merge", rewrite),
        *(
            pytest.param(verb, rewrite, marks=pytest.mark.matrix)
            for verb in CHANGED
            if verb not in ("graft", "merge")
        ),
    ],
)
def test_inputs_that_change_while_they_are_read(place, tmp_path, monkeypatch, verb, how):
    """Under the hands of a verb: one message that names the file, and no output of two states."""
    inputs = Path(shutil.copytree(place.parent, tmp_path / "inputs"))
    victim, folder = inputs / CHANGED[verb], tmp_path / "outputs"
    folder.mkdir()
    monkeypatch.chdir(folder)  # split writes the name that it was given
    positional, options = asked(verb, inputs / "in", folder / "out")

    def meddle(name: str, given: tuple) -> None:
        late = name == "open" and str(given[0]).endswith("new_tokens.jsonl")
        early = name == "os.mkdir" and "out.partial" in str(given[0])
        if armed and (late if verb == "learn" else early):
            armed.clear()
            how(victim)

    armed = [True]
    sys.addaudithook(meddle)
    with pytest.raises(LexigraftError) as fault:
        getattr(lexigraft, verb, mend)(*positional, **options)  # mend is no name of `lexigraft`
    assert not armed
    assert str(victim) in fault.value.found and fault.value.fix
    kept = (
        ["out.partial"] if verb == "train" else []
    )  # its checkpoints, which --resume goes on from
    assert [path.name for path in folder.iterdir()] == kept


def test_what_is_a_change_of_an_input_and_what_is_none(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    names = ("rewritten", "replaced", "removed")
    for name in names:
        (folder / name).write_bytes(bytes(9))
        os.utime(folder / name, ns=(0, 0))
    inputs = Inputs([folder, folder / "never-there"])
    (folder / "new").touch()
    for name in names:
        (folder / name).read_bytes()
        os.link(folder / name, tmp_path / name)
    inputs.require_unchanged()

    def replace(path: Path) -> None:
        """Another file of the same size and time."""
        shutil.copy2(path, tmp_path / "copy")
        (tmp_path / "copy").replace(path)

    for name, change in zip(names, (rewrite, replace, Path.unlink), strict=True):
        inputs = Inputs([folder])
        change(folder / name)
        with pytest.raises(LexigraftError, match=f"{name} was changed"):
            inputs.require_unchanged()


@pytest.mark.parametrize(
    ("limit", "left"),
    [
        (200, set()),
        pytest.param(20_000, {"vocab"}, marks=pytest.mark.matrix),
        pytest.param(150_000, {"vocab", "model"}, marks=pytest.mark.matrix),
    ],
)
def test_a_run_on_a_full_disk_keeps_whole_stages_and_goes_on(tmp_path, limit, left):
    """It fills up as the first stage is noted, while the model is grafted, and in training."""
    test_pipeline.write_inputs(tmp_path)
    recipe = test_pipeline.RECIPE.format(steps=3) + "control: false\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    output = tmp_path / "out"
    status, _, errors = done("run", tmp_path, output, -limit)
    assert status == 2 and "is full" in errors and "Traceback" not in errors, errors
    assert {path.name for path in output.iterdir()} - {".lexigraft-lock", "run.json"} == left
    if limit < 20_000:  # that it goes on at all
        require_run_folder(output)
        return
    result = run(tmp_path / "recipe.yaml", output=output)
    stages = {"vocab": "learn", "model": "graft"}
    assert set(result.skipped) == {stages[name] for name in left}
    run(tmp_path / "recipe.yaml", output=tmp_path / "whole")
    for name in ("vocab", "model", "adapter", "merged"):
        assert lasting(output / name) == lasting(tmp_path / "whole" / name), name


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
