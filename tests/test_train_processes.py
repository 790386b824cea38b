"""Laws 12 and 13 for every way to train, in one process and in two, and what two print and write."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import launching
from lexigraft import graft, merge, run, train
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.errors import RefusalError
from lexigraft.files import read_json, write_json
from test_train_full import FIRST, TOKENS

torch.set_num_threads(1)
SCRIPT = Path(__file__).with_name("two_processes.py")
# High rates and little room below the clip: what could move a frozen row would.
OPTIONS = {
    "max_steps": 5, "block_size": 32, "learning_rate": 3e-3, "new_row_learning_rate": 1e-2,
    "weight_decay": 0.1, "measurements": 2, "measured_bytes": 1500, "save_steps": 2,
}  # fmt: skip
SHAPES = [f"{tied}-{pad}" for tied in ("tied", "untied") for pad in ("padded", "bare")]
MODES = ["rows", "lora", "full"]


@pytest.fixture
def place(grafted_models):
    return grafted_models


def after_a_stage(place, shape):
    """A model of this shape that a stage of full training with slow old rows has left."""
    tied, pad = shape.split("-")
    start, out = place / tied, place / shape
    if out.exists():
        return out
    if pad == "bare":
        start = place / f"{shape}-grafted"
        graft(place / f"base_{tied}", place / "vocab", pad_to=1, output=start)
    corpus = [place / "corpus.txt"]
    train(start, corpus=corpus, mode="full", old_rows="slow", output=out, **OPTIONS)
    return out


def require_law_12(source, out, mode, tmp_path):
    """Old rows bit for bit; the body too in mode rows; every row that was seen has moved."""
    result, after = read_json(out / "training.json"), out
    if mode != "full":
        after = tmp_path / f"merged-{out.name}"
        merge(source, [out], output=after)
    one, other = Checkpoint.open(source), Checkpoint.open(after)
    assert one.tensors.keys() == other.tensors.keys()
    moved = np.zeros(TOKENS - FIRST, bool)
    for name in one.tensors:
        before, now = one.read(name), other.read(name)
        if "embed" in name or "head" in name:
            assert np.array_equal(before[:FIRST], now[:FIRST]), name
            assert np.array_equal(before[TOKENS:], now[TOKENS:]), name
            moved |= (before[FIRST:TOKENS] != now[FIRST:TOKENS]).any(axis=1)
        elif mode == "rows":
            assert np.array_equal(before, now), name
        elif mode == "full" or "norm" not in name:
            assert not np.array_equal(before, now), name
    seen = [row["targets"] + row["inputs"] > 0 for row in result["rows"]]
    assert sum(seen) > 10
    assert all(moved[np.array(seen)])


def require_same_curve(one, other):
    logs = [read_json(folder / "training.json")["log"] for folder in (one, other)]
    for entry, twin in zip(*logs, strict=True):
        for key in ("step", "text_bytes", "tokens", "train_bpb", "domain_bpb"):
            assert entry[key] == (twin[key] and pytest.approx(twin[key], rel=1e-4)), key


@pytest.mark.matrix
def test_law_12_in_one_process_and_in_two(place, tmp_path):
    """12 cases: {tied, untied} x {padded, not} x modes, with decay, clipping and a stage before."""
    cases = []
    for shape, mode in itertools.product(SHAPES, MODES):
        options = {**OPTIONS, "mode": mode}
        cases.append(
            (str(after_a_stage(place, shape)), str(tmp_path / f"two-{shape}-{mode}"), options)
        )
    write_json(place / "together.json", cases)
    launching.torchrun(SCRIPT, "together", place)
    for source, two, options in cases:
        one = Path(two.replace("two-", "one-"))
        train(source, corpus=[place / "corpus.txt"], output=one, batch_size=2, **options)
        for out in (one, Path(two)):
            require_law_12(Path(source), out, options["mode"], tmp_path)
        require_same_curve(one, Path(two))


def sharded_cases(place, tmp_path, shapes):
    return [
        (str(after_a_stage(place, shape)), str(tmp_path / f"{shape}-{mode}"), mode)
        for shape, mode in itertools.product(shapes, MODES)
    ]


@pytest.mark.parametrize(
    "shapes", [["tied-padded"], pytest.param(SHAPES, marks=pytest.mark.matrix)], ids=["one", "all"]
)
def test_law_12_of_sharded_models(place, tmp_path, shapes):
    """fully_shard, two processes: one curve with one process, frozen bits, rows gathered whole."""
    cases = sharded_cases(place, tmp_path, shapes)
    write_json(place / "sharded.json", cases)
    launching.torchrun(SCRIPT, "sharded", place)
    for _, output, _ in cases:
        files = [Path(output) / rank / "adapter_model.safetensors" for rank in ("0", "1")]
        assert files[0].read_bytes() == files[1].read_bytes()
        alone = load_file(Path(output) / "0" / "alone" / "adapter_model.safetensors")
        written = load_file(files[0])
        assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in alone.items()}


def test_accelerate_launch_trains_as_one_process_does(place, tmp_path):
    """One result on standard output, one notice on the other, one curve, a complete adapter."""
    options = ["--max-steps", "4", "--block-size", "32", "--weight-decay", "0.1", "--json"]
    done = launching.launched(
        "train", place / "untied", "--corpus", place / "corpus.txt", "-o", tmp_path / "two",
        *options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(tmp_path / "two")
    assert done.stderr.count("training ") == 1
    train(
        place / "untied", corpus=[place / "corpus.txt"], output=tmp_path / "one", max_steps=4,
        block_size=32, batch_size=2, weight_decay=0.1,
    )  # fmt: skip
    require_same_curve(tmp_path / "one", tmp_path / "two")
    require_law_12(place / "untied", tmp_path / "two", "lora", tmp_path)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two")]
    assert files[0].keys() == files[1].keys()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged-two", "one", "two"]


@pytest.mark.parametrize("name", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_ways_that_were_never_seen_to_work_are_refused(place, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "true")
    with pytest.raises(RefusalError, match=name):
        train(place / "tied", corpus=[place / "corpus.txt"], output=tmp_path / "o", max_steps=1)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_is_run_by_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{base: base, corpus: c.txt}")
    with pytest.raises(RefusalError, match="2 processes"):
        run(recipe, output=tmp_path / "run")
    assert list(tmp_path.iterdir()) == [recipe]
