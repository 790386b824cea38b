"""A run that is killed, told to stop, or gone astray: what is kept, and that resuming is exact."""

import random
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from launching import environment
from lexigraft import LexigraftError, train
from lexigraft.files import read_json, write_json
from lexigraft.models.unfinished import PLAN_FILE, last_checkpoint

torch.set_num_threads(1)
STEPS = 60
OPTIONS = {"max_steps": STEPS, "block_size": 32, "measurements": 2, "measured_bytes": 1500}


@pytest.fixture
def place(grafted_models):
    return grafted_models


def started(place, out, mode, *more):
    """`lexigraft train` in a process of its own; it saves every two steps."""
    command = [
        *(sys.executable, "-m", "lexigraft", "train", place / "tied", "--mode", mode, "-o", out),
        *("--corpus", place / "corpus.txt", "--max-steps", STEPS, "--block-size", 32),
        *("--save-steps", 2, *more),
    ]
    return subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, env=environment()
    )


def wait_for_checkpoint(child, out, steps=1):
    partial = out.with_name(f"{out.name}.partial")
    while child.poll() is None:
        found = last_checkpoint(partial)
        if found is not None and int(found.name.split("-")[1]) >= steps:
            return partial
        time.sleep(0.005)
    return partial


def weights(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.safetensors"))}


def whole_run(place, folder, mode):
    options = {"max_steps": STEPS, "block_size": 32, "save_steps": 2, "mode": mode}
    train(place / "tied", corpus=[place / "corpus.txt"], output=folder / "whole", **options)
    return options


def killed_and_resumed(place, folder, mode, options, rng, *, signals):
    """Once per signal: kill or stop the run at a random moment; then let it end."""
    out = folder / "out"
    for number, one in enumerate(signals):
        child = started(place, out, mode, *(["--resume"] if number else []))
        wait_for_checkpoint(child, out)
        time.sleep(rng.random() * 0.3)
        child.send_signal(one)
        child.communicate()
        if out.exists():  # it was faster than the signal
            return out
    train(place / "tied", corpus=[place / "corpus.txt"], output=out, resume=True, **options)
    return out


@pytest.mark.parametrize("mode", ["full"])
def test_a_stopped_and_a_killed_run_end_in_the_same_bytes(place, tmp_path, mode):
    """SIGTERM saves, says how to go on and ends with 143; then SIGKILL; then to the end."""
    options = whole_run(place, tmp_path, mode)
    out = tmp_path / "out"
    child = started(place, out, mode)
    partial = wait_for_checkpoint(child, out, 2)
    child.send_signal(signal.SIGTERM)
    _, told = child.communicate()
    assert child.returncode == 143 and "--resume" in told and "stopped by SIGTERM" in told
    step = int(last_checkpoint(partial).name.split("-")[1])
    assert f"after step {step} of {STEPS}" in told and not out.exists()
    rng = random.Random(1)
    out = killed_and_resumed(place, tmp_path, mode, options, rng, signals=[])
    assert weights(out) == weights(tmp_path / "whole")
    assert not partial.exists()


@pytest.mark.matrix
@pytest.mark.parametrize("mode", ["rows", "lora", "full"])
def test_kills_at_random_moments_change_nothing(place, tmp_path, mode):
    """21 of them over the three modes, some of them SIGTERM, in two runs each."""
    options = whole_run(place, tmp_path, mode)
    rng = random.Random(mode)
    for count in (3, 4):
        folder = tmp_path / str(count)
        folder.mkdir()
        signals = [rng.choice([signal.SIGKILL, signal.SIGTERM]) for _ in range(count)]
        out = killed_and_resumed(place, folder, mode, options, rng, signals=signals)
        assert weights(out) == weights(tmp_path / "whole")


@pytest.mark.matrix
def test_another_vocabulary_is_no_way_to_go_on(place, tmp_path):
    """The two numbers of tokens are named."""
    out = tmp_path / "out"
    child = started(place, out, "rows")
    partial = wait_for_checkpoint(child, out)
    child.kill()
    child.communicate()
    plan = read_json(partial / PLAN_FILE)
    write_json(partial / PLAN_FILE, {**plan, "tokens": 400, "tokenizer": "another"})
    with pytest.raises(LexigraftError, match="had tokens 400, this one has 422"):
        train(
            place / "tied", corpus=[place / "corpus.txt"], output=out, mode="rows", resume=True,
            max_steps=STEPS, block_size=32,
        )  # fmt: skip


@pytest.mark.parametrize("rate", [30.0, 1e30], ids=["astray", "not finite"])
def test_a_run_that_goes_astray_names_the_last_good_checkpoint(place, tmp_path, rate):
    with pytest.raises(LexigraftError, match="the last good checkpoint is") as caught:
        train(
            place / "untied", corpus=[place / "corpus.txt"], output=tmp_path / "out", mode="full",
            learning_rate=rate, new_row_learning_rate=rate, schedule="constant", warmup=0.5,
            save_steps=1, **OPTIONS,
        )  # fmt: skip
    partial = tmp_path / "out.partial"
    assert str(partial) in caught.value.found and "--learning-rate" in caught.value.fix
    named = caught.value.found.rpartition("checkpoint-")[2]
    assert (partial / "checkpoints" / f"checkpoint-{named}").is_dir()


def test_a_run_that_was_killed_after_its_last_step_makes_none_more(place, tmp_path):
    """More text than steps: Trainer by itself goes on from the last checkpoint by one step."""
    from lexigraft.models.load import load_model
    from lexigraft.models.preparation import measure, prepare, read_texts
    from lexigraft.models.training import Schedule, fit
    from lexigraft.models.whole_model import make_all_trainable
    from test_train import settings

    texts = read_texts([place / "corpus.txt"], (), (), seed=0, measured_bytes=1000)
    job = prepare(place / "tied", texts, settings(mode="full", block_size=32, max_bytes=3000))
    schedule = Schedule(3, 1, 1e-3, 3e-3, 3, frozenset({3}), 0)
    assert len(job.blocks) > 2 * schedule.steps
    found = []
    for resume in (False, True):
        model = load_model(job.folder)
        rows = make_all_trainable(model, job.ids, old_rows=False)
        fit(
            model, rows, job.blocks, schedule, folder=tmp_path, trained_on=None, resume=resume,
            measure=partial(measure, job, model), advance=lambda n: None,
        )  # fmt: skip
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
