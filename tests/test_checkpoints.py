"""Safetensors on disk: `pytest tests/test_checkpoints.py`."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import parts
from lexigraft.checkpoints import write
from lexigraft.checkpoints.checkpoint import INDEX, SINGLE, Checkpoint
from lexigraft.checkpoints.growth import Growth, grown
from lexigraft.checkpoints.header import DTYPE_BITS, header_bytes, read_header
from lexigraft.checkpoints.plan import Compute, Plan, PlannedTensor
from lexigraft.checkpoints.rows import read_ids, read_rows
from lexigraft.checkpoints.survey import survey
from lexigraft.checkpoints.write import write_plan
from lexigraft.errors import LexigraftError, RefusalError


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A real tiny Llama in several shards."""
    folder = tmp_path_factory.mktemp("sharded")
    return parts.write_model(folder, tokens=96, dtype="bfloat16", shard_size="20KB")


@pytest.fixture
def copy_of(sharded, tmp_path):
    return Path(shutil.copytree(sharded, tmp_path / "copy"))


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# -- headers


def test_reads_what_the_reference_library_writes(tmp_path):
    from safetensors.numpy import save_file

    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.array(7, dtype=np.int64),
        "empty": np.empty((0, 4), np.float16),
        "ü": np.ones((3,), np.uint8),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"k": "v"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.metadata == {"k": "v"}
    data = (tmp_path / "x.safetensors").read_bytes()
    assert {t.name: data[t.begin : t.end] for t in header.tensors} == {
        name: array.tobytes() for name, array in arrays.items()
    }
    assert {t.name: t.shape for t in header.tensors} == {n: a.shape for n, a in arrays.items()}


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
            st.sampled_from(sorted(DTYPE_BITS)),
            st.lists(st.integers(0, 8).map(lambda n: 4 * n), max_size=3).map(tuple),
        ),
        unique_by=lambda item: item[0],
        max_size=5,
    )
)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_written_header_is_valid_for_the_reference_library(tmp_path, tensors):
    from safetensors import safe_open

    tensors = [
        item
        for item in tensors
        if item[0] != "__metadata__" and np.prod(item[2]) * DTYPE_BITS[item[1]] % 8 == 0
    ]
    head = header_bytes(tensors, {"format": "pt"})
    size = sum(int(np.prod(shape)) * DTYPE_BITS[dtype] // 8 for _, dtype, shape in tensors)
    path = tmp_path / "x.safetensors"
    path.write_bytes(head + bytes(size))
    assert len(head) % 8 == 0
    with safe_open(path, "np") as opened:
        assert sorted(opened.keys()) == sorted(name for name, _, _ in tensors)
        assert opened.metadata() == {"format": "pt"}
    ours = read_header(path)
    assert [(t.name, t.dtype, t.shape) for t in ours.tensors] == tensors


DAMAGE = {
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-10]),
    "is empty": lambda p: p.write_bytes(b""),
    "longer": lambda p: p.write_bytes(p.read_bytes() + b"xx"),
    "a pointer": lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha"),
    "header too long": lambda p: p.write_bytes(struct.pack("<Q", 2**40) + b"{}"),
    "not JSON": lambda p: write_raw(p, b"{nope}"),
    "not UTF-8": lambda p: write_raw(p, b'{"\xff": 1}'),
    "a list": lambda p: write_raw(p, []),
    "deep": lambda p: write_raw(p, b"[" * 200_000),
    "a hole": lambda p: write_raw(p, {"a": entry(offsets=(4, 8))}, bytes(8)),
    "an overlap": lambda p: write_raw(
        p, {"a": entry(shape=(2,), offsets=(0, 8)), "b": entry(offsets=(4, 8))}, bytes(8)
    ),
    "twice": lambda p: write_raw(
        p, b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(4)
    ),
    "wrong size": lambda p: write_raw(p, {"a": entry(shape=(3,))}, bytes(4)),
    "negative": lambda p: write_raw(p, {"a": entry(shape=(-1,), offsets=(0, -4))}),
    "boolean": lambda p: write_raw(p, {"a": entry(shape=(True,))}, bytes(4)),
    "unknown type": lambda p: write_raw(p, {"a": entry(dtype="F12")}, bytes(4)),
    "type is a list": lambda p: write_raw(p, {"a": {**entry(), "dtype": []}}, bytes(4)),
    "half an entry": lambda p: write_raw(p, {"a": {"dtype": "F32"}}, bytes(4)),
    "entry is text": lambda p: write_raw(p, {"a": "F32"}, bytes(4)),
    "metadata": lambda p: write_raw(p, {"__metadata__": {"a": 1}, "a": entry()}, bytes(4)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named(damage, tmp_path):
    path = write_raw(tmp_path / "m.safetensors", {"a": entry()}, bytes(4))
    read_header(path)
    DAMAGE[damage](path)
    with pytest.raises(LexigraftError) as fault:
        read_header(path)
    assert "m.safetensors" in fault.value.found


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_change_of_the_header_is_read_or_named(tmp_path, sharded, data):
    source = (sharded / "model-00001-of-00003.safetensors").read_bytes()
    length = 8 + struct.unpack("<Q", source[:8])[0]
    place = data.draw(st.integers(0, length - 1))
    broken = source[:place] + data.draw(st.binary(max_size=3)) + source[place + 1 :]
    path = tmp_path / "m.safetensors"
    path.write_bytes(broken)
    try:
        read_header(path)
    except LexigraftError as fault:
        assert str(path) in fault.found


# -- folders


def test_reads_rows_in_the_storage_type(sharded):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(sharded, dtype="auto")
    checkpoint = Checkpoint.open(sharded)
    assert len(checkpoint.shards) > 2
    state = model.state_dict()
    assert set(checkpoint.tensors) == set(state)
    for name, tensor in state.items():
        ours = checkpoint.read(name)
        assert ours.dtype == ml_dtypes.bfloat16
        assert (ours.view(np.int16) == tensor.view(torch.int16).numpy()).all()
    rows = checkpoint.read("lm_head.weight", 5, 9)
    assert (rows == checkpoint.read("lm_head.weight")[5:9]).all()
    picked = read_ids(checkpoint.tensor("lm_head.weight"), [0, 3, 4, 5, 95])
    assert (picked == checkpoint.read("lm_head.weight")[[0, 3, 4, 5, 95]]).all()
    with pytest.raises(LexigraftError, match="rows"):
        checkpoint.read("lm_head.weight", 90, 97)
    with pytest.raises(LexigraftError, match="no tensor"):
        checkpoint.read("lm_head.bias")


def test_follows_the_symlinks_of_a_hub_cache(sharded, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(blobs / str(number))
    linked, plain = Checkpoint.open(snapshot), Checkpoint.open(sharded)
    assert linked.tensors.keys() == plain.tensors.keys()
    name = "model.norm.weight"
    assert (linked.read(name) == plain.read(name)).all()


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def truncate(folder):
    path = folder / "model-00002-of-00003.safetensors"
    os.truncate(path, path.stat().st_size - 100)


FAULTS = {
    "a missing shard": (
        lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
        "model-00002-of-00003.safetensors",
    ),
    "a truncated shard": (truncate, "truncated"),
    "a path outside": (
        lambda f: edit_index(f, lambda i: i["weight_map"].update(x="../secret.safetensors")),
        "../secret.safetensors",
    ),
    "an absolute path": (
        lambda f: edit_index(f, lambda i: i["weight_map"].update(x="/etc/x.safetensors")),
        "/etc/x.safetensors",
    ),
    "no safetensors": (
        lambda f: edit_index(f, lambda i: i["weight_map"].update(x="config.json")),
        "config.json",
    ),
    "a phantom tensor": (
        lambda f: edit_index(
            f, lambda i: i["weight_map"].update(x="model-00001-of-00003.safetensors")
        ),
        "names x",
    ),
    "the wrong shard": (
        lambda f: edit_index(
            f,
            lambda i: i["weight_map"].update(
                {"lm_head.weight": "model-00002-of-00003.safetensors"}
            ),
        ),
        "lm_head.weight",
    ),
    "no weight map": (lambda f: (f / INDEX).write_text("[]"), "weight_map"),
    "an index that is no JSON": (lambda f: (f / INDEX).write_text("{"), "JSON"),
    "two forms": (
        lambda f: shutil.copyfile(f / "model-00001-of-00003.safetensors", f / SINGLE),
        SINGLE,
    ),
    "no index": (lambda f: (f / INDEX).unlink(), "no " + INDEX),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "a config of another kind": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_contradictory_folder_is_explained(fault, copy_of):
    damage, expected = FAULTS[fault]
    damage(copy_of)
    with pytest.raises(LexigraftError) as caught:
        Checkpoint.open(copy_of)
    assert expected in caught.value.found
    assert caught.value.fix


def test_a_stale_copy_in_another_shard_is_found(copy_of):
    second = copy_of / "model-00002-of-00003.safetensors"
    header = read_header(second)
    layout = [(t.name, t.dtype, t.shape) for t in header.tensors]
    data = second.read_bytes()[header.tensors[0].begin :]
    head = header_bytes([*layout, ("lm_head.weight", "BF16", (1, 1))], {"format": "pt"})
    second.write_bytes(head + data + bytes(2))
    with pytest.raises(LexigraftError, match=r"lm_head\.weight is both in"):
        Checkpoint.open(copy_of)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("consolidated.safetensors", "Mistral"),
        ("model.gguf", "GGUF"),
        ("adapter_model.safetensors", "adapter"),
        ("README.md", "no weights"),
    ],
)
def test_other_weights_are_refused_by_name(name, expected, copy_of):
    for path in copy_of.glob("model*"):
        path.unlink()
    (copy_of / name).write_bytes(b"x")
    with pytest.raises(LexigraftError, match=expected):
        Checkpoint.open(copy_of)


def test_the_command_printed_for_a_pickle_converts_it(tmp_path):
    import torch
    from safetensors.torch import load_file

    folder = parts.write_model(tmp_path / "a model", tokens=96, tied=True)
    weights = load_file(folder / SINGLE)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()
    with pytest.raises(RefusalError, match=r"pytorch_model\.bin") as fault:
        Checkpoint.open(folder)
    command = shlex.split(fault.value.fix)
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
    converted = Checkpoint.open(folder)
    assert set(converted.tensors) == set(weights)
    for name, tensor in weights.items():
        assert (converted.read(name) == tensor.numpy()).all()


# -- rewriting


def test_an_unchanged_plan_gives_the_same_files(sharded, tmp_path):
    plan = Plan.of(Checkpoint.open(sharded))
    copied, written = write_plan(plan, tmp_path)
    names = [path.name for path in sharded.glob("*.safetensors")]
    for name in names:
        assert (tmp_path / name).read_bytes() == (sharded / name).read_bytes()
    assert json.loads((tmp_path / INDEX).read_text()) == json.loads((sharded / INDEX).read_text())
    assert written == sum((sharded / name).stat().st_size for name in names)
    assert copied == Checkpoint.open(sharded).bytes == plan.sizes()[0]


def ramp(rows: int, width: int):
    values = np.arange(rows * width, dtype=np.float32).reshape(rows, width)
    return values.astype(ml_dtypes.bfloat16)


def computed(name: str, values):
    blocks = Compute(values.nbytes, lambda: iter(np.array_split(values, 3)))
    return PlannedTensor(name, "BF16", values.shape, (blocks,))


@pytest.mark.parametrize("threads", [1, 3])
def test_replaced_added_and_dropped_tensors(threads, sharded, tmp_path):
    from safetensors import safe_open

    base = Checkpoint.open(sharded)
    new_head, extra = ramp(100, 32), ramp(7, 5)
    dropped = "model.layers.0.mlp.up_proj.weight"
    plan = (
        Plan.of(base)
        .replace([computed("lm_head.weight", new_head)])
        .add(computed("extra", extra), after="model.norm.weight")
        .drop(dropped)
    )
    write_plan(plan, tmp_path, threads=threads)
    (tmp_path / "config.json").write_text("{}")
    after = Checkpoint.open(tmp_path)
    assert set(after.tensors) == set(base.tensors) - {dropped} | {"extra"}
    for name in after.tensors:
        expected = {"lm_head.weight": new_head, "extra": extra}.get(name)
        expected = base.read(name) if expected is None else expected
        assert after.read(name).tobytes() == expected.tobytes()
    assert after.index["metadata"]["total_size"] == after.bytes
    assert after.tensors["extra"].path.name == base.tensors["model.norm.weight"].path.name
    for shard in after.shards:
        with safe_open(tmp_path / shard, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_files_get_ordinary_permissions_and_metadata(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    write_raw(source / SINGLE, {"a": entry()}, struct.pack("<f", 2.5))
    (source / "config.json").write_text("{}")
    plan = Plan.of(Checkpoint.open(source))
    plan = plan.add(computed("b", ramp(2, 2)), after="a")
    out = tmp_path / "out"
    out.mkdir()
    old = os.umask(0o027)
    try:
        write_plan(plan, out)
    finally:
        os.umask(old)
    assert (out / SINGLE).stat().st_mode & 0o777 == 0o640
    header = read_header(out / SINGLE)
    assert header.metadata == {"format": "pt"}
    assert header.tensors[0].begin % 8 == 0
    assert not (out / INDEX).exists()


@pytest.mark.parametrize("error", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, None])
@pytest.mark.parametrize("calls", [["copy_file_range"], ["copy_file_range", "sendfile"]])
def test_copies_without_the_kernels_help(error, calls, sharded, tmp_path, monkeypatch):
    """First sendfile stands in, then a buffer; all of them give the same files."""

    def fail(*_):
        raise OSError(error, os.strerror(error))

    for call in calls:
        if error is not None:
            monkeypatch.setattr(os, call, fail, raising=False)
        elif call == "copy_file_range":
            monkeypatch.delattr(os, call, raising=False)  # macOS has none
        else:
            monkeypatch.setattr(sys, "platform", "darwin")  # where sendfile wants a socket
    plan = Plan.of(Checkpoint.open(sharded)).drop("model.norm.weight")
    write_plan(plan, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    after = Checkpoint.open(tmp_path)
    for name, tensor in plan.sources.items():
        if name != "model.norm.weight":
            assert after.read(name).tobytes() == read_rows(tensor).tobytes()


@pytest.mark.skipif(sys.platform != "linux", reason="the call is Linux's")
def test_a_copy_within_the_kernel_is_what_happens_here(sharded, tmp_path, monkeypatch):
    used = set()
    for name in ("copy_file_range", "sendfile"):
        call = getattr(os, name)

        def spy(*given, name=name, call=call):
            used.add(name)
            return call(*given)

        monkeypatch.setattr(os, name, spy)
    write_plan(Plan.of(Checkpoint.open(sharded)).drop("model.norm.weight"), tmp_path)
    assert used in ({"copy_file_range"}, {"sendfile"})


@pytest.mark.skipif(sys.platform != "linux", reason="the call is Linux's")
@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, None])
def test_blocks_are_shared_where_the_file_system_can(error, sharded, tmp_path, monkeypatch):
    """FICLONE needs btrfs or XFS: its refusals are those of the kernel, its success is played."""
    import fcntl

    asked = []

    def clone(target, request, source):
        asked.append(request)
        if error is not None:
            raise OSError(error, os.strerror(error))
        os.write(target, os.pread(source, os.fstat(source).st_size, 0))
        os.lseek(target, 0, os.SEEK_SET)  # a clone leaves the place where it was
        return 0

    monkeypatch.setattr(fcntl, "ioctl", clone)
    steps = []
    sizes = write_plan(Plan.of(Checkpoint.open(sharded)), tmp_path, advance=steps.append)
    shards = list(sharded.glob("*.safetensors"))
    for path in shards:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert asked == [0x40049409] * len(shards)
    assert sum(steps) == sum(path.stat().st_size for path in shards)
    assert sizes[1] == (sum(steps) if error else 0)  # nothing is written where blocks are shared


def test_a_shard_that_cannot_be_shared_for_another_reason_is_an_error(
    sharded, tmp_path, monkeypatch
):
    if sys.platform != "linux":
        pytest.skip("the call is Linux's")
    import fcntl

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "ioctl", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_plan(Plan.of(Checkpoint.open(sharded)), tmp_path)


def test_a_fault_in_one_shard_stops_the_others(tmp_path):
    """The third of three shards is damaged: 2 x 4 GB of holes are not copied to the end first."""
    size = 2**31
    for name in "ab":
        head = header_bytes([(name, "BF16", (size,))], {})
        path = tmp_path / f"model-0000{'ab'.index(name) + 1}-of-00003.safetensors"
        path.write_bytes(head)
        os.truncate(path, len(head) + 2 * size)
    last = tmp_path / "model-00003-of-00003.safetensors"
    write_raw(last, {"c": entry()}, struct.pack("<f", 1.0))
    places = {name: f"model-0000{i}-of-00003.safetensors" for i, name in enumerate("abc", 1)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    (tmp_path / "config.json").write_text("{}")
    plan = Plan.of(Checkpoint.open(tmp_path))
    os.truncate(last, 0)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(LexigraftError, match="became shorter"):
        write_plan(in_ranges(plan), out)
    assert sum(path.stat().st_blocks * 512 for path in out.iterdir()) < size


def in_ranges(plan: Plan) -> Plan:
    """`plan` without files that are copied as a whole."""
    files = tuple(dataclasses.replace(file, verbatim=None) for file in plan.files)
    return dataclasses.replace(plan, files=files)


def test_what_is_done_meanwhile_can_end_the_writing(sharded, tmp_path):
    def refuse():
        raise LexigraftError("no", needed="yes", fix="ask again")

    with pytest.raises(LexigraftError, match="no"):
        write_plan(Plan.of(Checkpoint.open(sharded)), tmp_path, meanwhile=refuse)


def test_a_file_that_shrinks_while_it_is_copied_is_an_error(copy_of, tmp_path):
    plan = Plan.of(Checkpoint.open(copy_of)).drop("model.norm.weight")
    shard = copy_of / "model-00003-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 500)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(LexigraftError, match="became shorter"):
        write_plan(plan, out)


@pytest.mark.parametrize(
    ("way", "time", "what"),
    [
        ("_write", 0, "the header of model-00003"),
        ("_write", 2, r"lm_head\.weight of model-00003"),
        ("_copy", 0, r"model\.norm\.weight of model-00003"),
        ("_copy", 1, "the file of model-00001"),
    ],
)
def test_a_replay_tells_what_is_not_on_the_disk(sharded, tmp_path, monkeypatch, way, time, what):
    """Header, computed and copied values of one file, and another file that is copied whole."""
    head = computed("lm_head.weight", ramp(96, 32))
    plan = Plan.of(Checkpoint.open(sharded)).replace([head])
    calls = []
    done = getattr(write, way)

    def damaging(*arguments):
        calls.append(way)
        done(*arguments)
        if len(calls) == time + 1:
            stream = next(one for one in arguments if hasattr(one, "seek"))
            stream.seek(-4, os.SEEK_CUR)
            stream.write(b"\xab\xcd\xef\x99")

    monkeypatch.setattr(write, "_cloned", lambda source, target: False)
    with monkeypatch.context() as patched:
        patched.setattr(write, way, damaging)
        with pytest.raises(LexigraftError, match=f"{what}.* is not what was written"):
            write_plan(plan, tmp_path, threads=1, replay=True)
    (tmp_path / "right").mkdir()
    write_plan(plan, tmp_path / "right", replay=True)


def test_links_point_to_the_file_behind_a_symlink(sharded, tmp_path):
    snapshot, out = tmp_path / "snapshot", tmp_path / "out"
    shutil.copytree(sharded, tmp_path / "blobs")
    snapshot.mkdir()
    out.mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (snapshot / path.name).symlink_to(path)
    base = Checkpoint.open(snapshot)
    plan = Plan.of(base).replace([computed("lm_head.weight", ramp(100, 32))])
    copied, written = write_plan(plan, out, link=True)
    changed = base.tensors["lm_head.weight"].path.name
    for name in base.shards:
        assert not (out / name).is_symlink()
        assert (out / name).samefile(snapshot / name) == (name != changed)
    assert written == (out / changed).stat().st_size
    assert (copied, written) == plan.sizes(link=True)


def test_a_full_disk_is_foreseen(tmp_path):
    size = 2 * shutil.disk_usage(tmp_path).free // 2 * 2
    head = header_bytes([("a", "BF16", (size // 2,))], {})
    (tmp_path / SINGLE).write_bytes(head)
    try:
        os.truncate(tmp_path / SINGLE, len(head) + size)  # takes no room: a sparse file
    except OSError:
        pytest.skip("this file system holds no sparse file larger than itself")
    (tmp_path / "config.json").write_text("{}")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(LexigraftError, match="GB free"):
        write_plan(Plan.of(Checkpoint.open(tmp_path)), out)
    assert not list(out.iterdir())


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_plan_whose_values_do_not_fit_fails(blocks, sharded, tmp_path):
    values = ramp(2, 4)
    wrong = Compute(2 * values.nbytes, lambda: iter([values] * blocks))
    tensor = PlannedTensor("lm_head.weight", "BF16", (4, 4), (wrong,))
    with pytest.raises(ValueError, match="computed"):
        write_plan(Plan.of(Checkpoint.open(sharded)).replace([tensor]), tmp_path)


def test_a_plan_knows_its_tensors(sharded):
    plan = Plan.of(Checkpoint.open(sharded))
    with pytest.raises(KeyError, match="nothing"):
        plan.replace([computed("nothing", ramp(1, 1))])
    with pytest.raises(KeyError, match="cannot add"):
        plan.add(computed("lm_head.weight", ramp(1, 1)), after="model.norm.weight")
    with pytest.raises(ValueError, match="parts of"):
        PlannedTensor("x", "F32", (3,), ())


# -- growth


@pytest.mark.parametrize(
    ("rows", "tokens", "new", "pad_to", "after"),
    [
        (128, 100, 105, 64, 128),
        (128, 100, 140, 64, 192),
        (96, 96, 100, 64, 128),
        (96, 96, 128, 64, 128),
        (96, 96, 101, 1, 101),
        (128, 100, 105, 100, 200),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_growth_by_id(rows, tokens, new, pad_to, after, dtype, tmp_path):
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    table = rng.normal(size=(rows, 6)).astype(dtype)
    stored = table.view(np.uint16) if dtype == ml_dtypes.bfloat16 else table
    save_file({"e": stored, "bias": stored[None, :, 0].copy()}, tmp_path / SINGLE)
    if dtype == ml_dtypes.bfloat16:
        data = (tmp_path / SINGLE).read_bytes().replace(b'"dtype":"U16"', b'"dtype":"BF16"', 2)
        length = struct.unpack("<Q", data[:8])[0] + 2
        (tmp_path / SINGLE).write_bytes(struct.pack("<Q", length) + data[8:])
    (tmp_path / "config.json").write_text("{}")
    base = Checkpoint.open(tmp_path)
    growth = Growth.to(rows, tokens, new, pad_to)
    assert growth.rows == after
    fresh = rng.normal(size=(new - tokens, 6)).astype(np.float32)
    out = tmp_path / "out"
    out.mkdir()
    table_mean = survey(base.tensors["e"], tokens).mean
    bias_mean = survey(base.tensors["bias"], tokens).mean
    plan = Plan.of(base).replace(
        [
            grown(base.tensors["e"], growth, lambda a, b: fresh[a:b], lambda: table_mean),
            grown(base.tensors["bias"], growth, lambda a, b: fresh[a:b, 0], lambda: bias_mean),
        ]
    )
    write_plan(plan, out)
    (out / "config.json").write_text("{}")
    result = Checkpoint.open(out)
    for values, old, added in (
        (result.read("e"), table, fresh),
        (result.read("bias")[0], table[:, 0], fresh[:, 0]),
    ):
        assert values.shape == (after, *old.shape[1:])
        assert values[:tokens].tobytes() == old[:tokens].tobytes()
        assert values[tokens:new].tobytes() == added.astype(dtype).tobytes()
        assert values[new:rows].tobytes() == old[new:].tobytes()
        mean = old[:tokens].astype(np.float64).mean(axis=0)
        padding = values[max(rows, new) :].astype(np.float64)
        assert np.abs(padding - mean).max(initial=0) <= np.abs(mean).max() * 2**-8
        assert len(padding) == growth.new_padding
