"""Laws 12 and 13 for every way to train, in one process and in two, and what two print and write."""

import importlib.util
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
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.files import read_json, write_json
from lexigraft.models import training
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
NO_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="pip install 'lexigraft[deepspeed]'"
)
WAYS = [
    *("copied", "fsdp2"),
    *(pytest.param(f"zero{stage}", marks=NO_DEEPSPEED) for stage in (2, 3)),
]


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


def weights(folder):
    return load_file(next(folder.glob("*.safetensors")))


ELSEWHERE = {"stop_at", "clip", "slow"}  # no options of `train`


def require_the_same_as_one_process(place, way, cases):
    """Each case trained by two processes at once, and by one with twice the blocks in a batch."""
    write_json(place / f"{way}.json", cases)
    launching.torchrun(SCRIPT, way, place)
    for source, two, options in cases:
        one = Path(two).with_name("one-" + Path(two).name)
        alone = {key: value for key, value in options.items() if key not in ELSEWHERE}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "CLIP_NORM", options.get("clip", training.CLIP_NORM))
            train(source, corpus=[place / "corpus.txt"], output=one, batch_size=2, **alone)
        require_same_curve(one, Path(two))
        ours, theirs = weights(one), weights(Path(two))
        assert ours.keys() == theirs.keys()
        # Batches of 16-bit numbers round in their own way, and Adam makes little gradients large.
        room = 1e-2 if "dtype" in options else 2e-4
        for name, tensor in ours.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=room, msg=name)


@pytest.mark.matrix
@pytest.mark.parametrize("way", WAYS)
def test_law_12_in_one_process_and_in_two(place, tmp_path, way):
    """12 cases: {tied, untied} x {padded, not} x modes, with decay, clipping and a stage before."""
    cases = [
        (str(after_a_stage(place, shape)), str(tmp_path / f"{shape}-{mode}"), {**OPTIONS, "mode": mode})
        for shape, mode in itertools.product(SHAPES, MODES)
    ]  # fmt: skip
    require_the_same_as_one_process(place, way, cases)
    for source, two, options in cases:
        for out in (Path(two), Path(two).with_name("one-" + Path(two).name)):
            require_law_12(Path(source), out, options["mode"], tmp_path)


@pytest.mark.matrix
def test_two_processes_distil_as_one_does(place, tmp_path):
    """Rows alone, and with LoRA in the first layers, which the teacher reads without."""
    cases = [
        (str(place / "tied"), str(tmp_path / mode), {**OPTIONS, "mode": mode, "objective": "distill"})
        for mode in ("rows", "lora")
    ]  # fmt: skip
    require_the_same_as_one_process(place, "copied", cases)


def test_fsdp2_trains_as_one_process_does(place, tmp_path):
    """Rows of their own beside LoRA, on a tied model, with a checkpoint that is resumed.

    The second process comes late to what was gathered, which the first one removes in the end.
    """
    out = str(tmp_path / "two")
    cases = [(str(place / "tied"), out, {**OPTIONS, "stop_at": 1, "slow": 10})]
    require_the_same_as_one_process(place, "fsdp2", cases)
    require_law_12(place / "tied", Path(out), "lora", tmp_path)


# What one process promises: each of these, and all at once where they can be.
PROMISES = {
    "checkpointing": {"mode": "full", "gradient_checkpointing": True},
    "accumulation": {"mode": "lora", "gradient_accumulation": 2, "gradient_checkpointing": True},
    "bf16": {"mode": "lora", "dtype": "bfloat16"},
    "slow": {"mode": "full", "old_rows": "slow", "gradient_accumulation": 2},
    "clipped": {"mode": "full", "clip": 1e-6},  # so that Adam's epsilon counts beside gradients
    "stopped": {
        "patience": 1,
        "measurements": 5,
        "learning_rate": 0.03,
        "new_row_learning_rate": 0.3,
    },
    "whole": {"mode": "full"},
    "resumed": {"mode": "full", "stop_at": 2},
}


@pytest.mark.matrix
@pytest.mark.parametrize("tied", ["tied", "untied"])
@pytest.mark.parametrize("way", WAYS)
def test_what_one_process_promises_two_keep(place, tmp_path, way, tied):
    cases = [
        (str(place / tied), str(tmp_path / name), {**OPTIONS, **options})
        for name, options in PROMISES.items()
        if not (way.startswith("zero") and "dtype" in options)  # which is refused
    ]
    require_the_same_as_one_process(place, way, cases)
    stopped = read_json(tmp_path / "stopped" / "training.json")
    assert stopped["stopped"] and stopped["kept_step"] == 1
    whole, clipped, resumed = (weights(tmp_path / name) for name in ("whole", "clipped", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert max((whole[name] - clipped[name]).abs().max() for name in whole) > 1e-3


def sharded_cases(place, tmp_path):
    return [
        (str(after_a_stage(place, shape)), str(tmp_path / f"{shape}-{mode}"), mode)
        for shape, mode in itertools.product(SHAPES, MODES)
    ]


@pytest.mark.matrix
def test_law_12_of_sharded_models(place, tmp_path):
    """fully_shard, two processes: one curve with one process, frozen bits, rows gathered whole."""
    cases = sharded_cases(place, tmp_path)
    write_json(place / "sharded.json", cases)
    launching.torchrun(SCRIPT, "sharded", place)
    for _, output, _ in cases:
        written, alone = (
            load_file(folder / "adapter_model.safetensors")
            for folder in (Path(output), Path(output) / "alone")
        )
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


ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("variables", "options", "named"),
    [
        (ZERO, {"mode": "rows", "objective": "distill"}, "distill under DeepSpeed"),
        (ZERO, {"dtype": "bfloat16"}, "bfloat16 under DeepSpeed"),
        (ZERO, {}, "one process"),
        ({**FSDP, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, {}, "by size"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "FSDP 1"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, {}, "FSDP_OFFLOAD_PARAMS"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "FSDP_ACTIVATION_CHECKPOINTING"),
        (FSDP, {"mode": "rows", "objective": "distill"}, "distill under FSDP2"),
        (FSDP, {"dtype": "nf4"}, "nf4 under FSDP2"),
        (FSDP, {}, "FSDP on cpu"),  # where Accelerate would copy the model, and say nothing
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ways_that_were_never_seen_to_work_are_refused(
    place, tmp_path, monkeypatch, variables, options, named
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(RefusalError, match=named):
        train(
            place / "tied", corpus=[place / "corpus.txt"], output=tmp_path / "o", max_steps=1,
            **options,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.matrix
@NO_DEEPSPEED
def test_accelerate_launches_deepspeed(place, tmp_path, monkeypatch):
    """Nothing but the result is on standard output, and with the launcher's defaults it is right."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    done = launching.launched(
        "train", place / "untied", "--corpus", place / "corpus.txt", "-o", tmp_path / "two",
        "--max-steps", 4, "--block-size", 32, "--gradient-accumulation", 2, "--json",
        way=("--use_deepspeed", "--zero_stage", "2"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(tmp_path / "two")
    train(
        place / "untied", corpus=[place / "corpus.txt"], output=tmp_path / "one", max_steps=4,
        block_size=32, batch_size=2, gradient_accumulation=2,
    )  # fmt: skip
    require_same_curve(tmp_path / "one", tmp_path / "two")


@pytest.mark.skipif(not NO_DEEPSPEED.args[0], reason="deepspeed is installed")
def test_deepspeed_that_is_not_installed_is_named(place, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LexigraftError, match=r"lexigraft\[deepspeed\]"):
        train(place / "tied", corpus=[place / "corpus.txt"], output=tmp_path / "o", max_steps=1)


def test_a_recipe_is_run_by_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{base: base, corpus: c.txt}")
    with pytest.raises(RefusalError, match="2 processes"):
        run(recipe, output=tmp_path / "run")
    assert list(tmp_path.iterdir()) == [recipe]
