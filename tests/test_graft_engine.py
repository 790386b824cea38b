"""The writer behind `graft` and `merge`: sizes of shards, faults of disks, memory."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import launching
import parts
from extend import extend
from lexigraft.checkpoints.checkpoint import INDEX, SINGLE, Checkpoint
from lexigraft.checkpoints.header import header_bytes
from lexigraft.checkpoints.plan import parse_size
from lexigraft.errors import LexigraftError
from lexigraft.families.tokenmap import TokenMap
from lexigraft.files import publish, sha256_file
from lexigraft.steps.check import check
from lexigraft.steps.graft import graft


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(BASE in six or more shards, VOCAB); no test changes them."""
    root = tmp_path_factory.mktemp("made")
    base = parts.write_byte_level(root / "base", vocab_size=330)
    tokens = TokenMap.read(base).tokens
    parts.write_model(base, tokens=tokens, layers=4, shard_size="20KB", dtype="bfloat16")
    return base, extend(base, root / "vocab", 9, literal=1)


@pytest.fixture
def copied(made, tmp_path):
    base, vocab = made
    return Path(shutil.copytree(base, tmp_path / "base")), vocab


def hashes(*folders: Path) -> dict[Path, str]:
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {path: sha256_file(path) for path in files}


def refused(base: Path, vocab: Path, out: Path, **options) -> LexigraftError:
    """The one message; inputs are untouched and nothing is left."""
    before, names = hashes(base, vocab), set(out.parent.glob("*"))
    with pytest.raises(LexigraftError) as fault:
        graft(base, vocab, output=out, **options)
    assert hashes(base, vocab) == before
    assert set(out.parent.glob("*")) == names
    assert fault.value.needed
    assert fault.value.fix
    return fault.value


# -- sizes of shards


@pytest.mark.parametrize("size", ["30KB", "1MB", 25_000])
def test_weights_are_cut_anew(size, made, tmp_path):
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    base, vocab = made
    plain, cut = tmp_path / "plain", tmp_path / "cut"
    graft(base, vocab, output=plain)
    dry = graft(base, vocab, output=cut, max_shard_size=size, dry_run=True)
    real = graft(base, vocab, output=cut, max_shard_size=size)
    assert (dry.bytes_copied, dry.bytes_written) == (real.bytes_copied, real.bytes_written)
    one, other = Checkpoint.open(plain), Checkpoint.open(cut)
    assert one.tensors.keys() == other.tensors.keys()
    assert all(one.read(name).tobytes() == other.read(name).tobytes() for name in one.tensors)
    files = {entry["tensor"]: entry["file"] for entry in dry.plan}
    assert files == {name: tensor.path.name for name, tensor in other.tensors.items()}

    limit, count = parse_size(size), len(other.shards)
    if size == "1MB":
        assert other.shards == [SINGLE]
        assert not (cut / INDEX).exists()
    else:
        expected = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        assert other.shards == expected
        assert sorted(path.name for path in cut.glob("*.safetensors")) == expected
        index = json.loads((cut / INDEX).read_text())
        assert index["metadata"]["total_size"] == other.bytes
        assert index["weight_map"] == files
    for header in other.headers.values():
        total = sum(tensor.bytes for tensor in header.tensors)
        assert total <= limit or len(header.tensors) == 1
        with safe_open(header.tensors[0].path, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}

    first, second = (AutoModelForCausalLM.from_pretrained(path) for path in (plain, cut))
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(tensor.equal(states[1][name]) for name, tensor in states[0].items())


def test_a_single_file_is_cut_into_several(tmp_path):
    base = parts.write_byte_level(tmp_path / "base", vocab_size=330)
    parts.write_model(base, tokens=TokenMap.read(base).tokens, tied=True)
    vocab = extend(base, tmp_path / "vocab", 3)
    graft(base, vocab, output=tmp_path / "cut", max_shard_size="30KB")
    cut, old = Checkpoint.open(tmp_path / "cut"), Checkpoint.open(base)
    assert len(cut.shards) > 2
    assert cut.tensors.keys() == old.tensors.keys()
    assert json.loads((tmp_path / "cut" / INDEX).read_text())["metadata"] == {
        "total_size": cut.bytes
    }


def test_merge_cuts_too(tmp_path):
    import adapter_parts
    from lexigraft.steps.merge import merge

    scene = adapter_parts.scene(tmp_path, "saved-both", tied=False)
    base, adapter = scene.start(ungrafted=True), scene.adapter
    merge(base, adapter, output=tmp_path / "plain")
    merge(base, adapter, output=tmp_path / "cut", max_shard_size="20KB")
    plain, cut = Checkpoint.open(tmp_path / "plain"), Checkpoint.open(tmp_path / "cut")
    assert len(cut.shards) > len(plain.shards)
    assert plain.tensors.keys() == cut.tensors.keys()
    assert all(plain.read(name).tobytes() == cut.read(name).tobytes() for name in plain.tensors)


def test_sizes_that_are_none(made, tmp_path):
    base, vocab = made
    for size in ("0", "many", "-5GB", "5XB", 0, ""):
        assert "size" in refused(base, vocab, tmp_path / "out", max_shard_size=size).found
    fault = refused(base, vocab, tmp_path / "out", max_shard_size="1GB", link=True)
    assert "--link" in fault.found


# -- faults


@contextmanager
def file_size_limit(limit: int):
    """Files of this process may not become larger: what a full quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("ways", ["kernel", "buffer"])
def test_a_disk_that_fills_up_under_way(ways, copied, tmp_path, monkeypatch):
    base, vocab = copied
    if ways == "buffer":
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    with file_size_limit(10_000):
        assert "full" in refused(base, vocab, tmp_path / "out").found


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
def test_no_space_left_on_the_device(tmp_path):
    with (
        pytest.raises(LexigraftError, match="full"),
        publish(tmp_path / "out") as partial,
        Path("/dev/full").open("wb") as full,
    ):
        (partial / "begun").write_text("x")
        full.write(b"x")
    assert not list(tmp_path.iterdir())


@pytest.mark.matrix
def test_a_real_disk_that_others_fill(made, tmp_path, monkeypatch):
    """A file system of 160 MB, of which another program takes what is left when we begin."""
    base, vocab = made
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160m", "none", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs more rights")
    theirs = disk / "theirs"

    def fill(*given, copy=os.copy_file_range):
        if not theirs.stat().st_size:
            with suppress(OSError), theirs.open("wb", buffering=0) as stream:
                while stream.write(bytes(2**20)):
                    pass
        return copy(*given)

    try:
        assert "GB free" in refused(holes(base, tmp_path / "big", 0.2), vocab, disk / "out").found
        half = holes(base, tmp_path / "half", 0.09)
        theirs.touch()
        monkeypatch.setattr(os, "copy_file_range", fill)
        assert "full" in refused(half, vocab, disk / "out").found
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.matrix
def test_a_real_disk_that_shares_blocks(made, tmp_path):
    """btrfs: untouched shards take no room, and none is asked for them."""
    maker = shutil.which("mkfs.btrfs")
    image, disk = tmp_path / "image", tmp_path / "disk"
    disk.mkdir()
    with image.open("wb") as stream:
        stream.truncate(400 * 2**20)
    if maker is None or subprocess.run([maker, "-q", image], check=False).returncode:
        pytest.skip("no mkfs.btrfs here")
    if subprocess.run(["mount", "-o", "loop", image, disk], check=False).returncode:
        pytest.skip("mounting a file system needs more rights")
    try:
        base = holes(made[0], disk / "base", 0.15)
        for shard in base.glob("*.safetensors"):
            with shard.open("r+b") as stream:  # of real bytes: a hole takes no room
                stream.seek(2**16)
                stream.write(b"\x3c\x3d" * (15 * 2**20))
                os.fsync(stream.fileno())
        assert shutil.disk_usage(disk).free < Checkpoint.open(base).bytes + 64 * 2**20
        result = graft(base, made[1], output=disk / "model")
        assert result.bytes_written < Checkpoint.open(base).bytes / 3
        assert check(disk / "model", base=base, deep=True).ok
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_may_not_be_written(copied, tmp_path):
    base, vocab = copied
    parent = tmp_path / "closed"
    parent.mkdir()
    with closed(parent):
        assert "cannot create" in refused(base, vocab, parent / "out").found
        assert "cannot create" in refused(base, vocab, parent / "deep" / "out").found


@contextmanager
def closed(folder: Path):
    """Nothing can be made in `folder`; permissions do not bind root, the immutable flag does."""
    if os.geteuid():
        folder.chmod(0o555)
        yield
        folder.chmod(0o755)
        return
    if not shutil.which("chattr"):
        pytest.skip("root cannot be kept from writing here")
    if subprocess.run(["chattr", "+i", folder], capture_output=True, check=False).returncode:
        pytest.skip("this file system has no immutable flag")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", folder], check=True)


def test_a_shard_that_may_not_be_read(made):
    """Root reads everything: so another user looks."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        base, vocab = (Path(shutil.copytree(path, root / path.name)) for path in made)
        for path in root.rglob("*.*"):
            path.chmod(0o644)  # safetensors' own writer lets nobody else read
        shard = Checkpoint.open(base).shards[2]
        (base / shard).chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(LexigraftError, match=os.strerror(errno.EACCES)) as fault:
                graft(base, vocab, output=root / "out")
        finally:
            os.seteuid(user)
        assert shard in fault.value.found
        assert {path.name for path in root.iterdir()} == {"base", "vocab"}


@pytest.mark.parametrize("whose", ["base", "vocab"])
def test_a_tokenizer_that_only_its_engine_refuses(whose, made, tmp_path):
    """It is told when weights are copied already; nothing of them stays."""
    folders = {
        name: Path(shutil.copytree(folder, tmp_path / name))
        for name, folder in zip(("base", "vocab"), made, strict=True)
    }
    path = folders[whose] / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "decoder": {"type": "None"}}))
    fault = refused(folders["base"], folders["vocab"], tmp_path / "out")
    assert f"{path} cannot be opened" in fault.found


def test_a_shard_that_vanishes_while_others_are_copied(copied, tmp_path, monkeypatch):
    """The first copy removes the last shard before it does its work."""
    base, vocab = copied
    names = Checkpoint.open(base).shards
    assert len(names) > 4  # more than are written at a time
    move = shutil.move

    def lose(*given, copy=os.copy_file_range):
        with suppress(FileNotFoundError):
            move(base / names[-1], tmp_path / "elsewhere")
        return copy(*given)

    monkeypatch.setattr(os, "copy_file_range", lose)
    with pytest.raises(LexigraftError) as fault:
        graft(base, vocab, output=tmp_path / "out")
    assert names[-1] in fault.value.found
    assert os.strerror(errno.ENOENT) in fault.value.found
    assert {path.name for path in tmp_path.iterdir()} == {"base", "elsewhere"}
    assert len(list(base.glob("*.safetensors"))) == len(names) - 1


def test_a_shard_that_becomes_shorter_while_others_are_copied(copied, tmp_path, monkeypatch):
    base, vocab = copied
    vocabulary = {"model.embed_tokens.weight", "lm_head.weight"}
    headers = Checkpoint.open(base).headers
    untouched = [n for n, h in headers.items() if not vocabulary & {t.name for t in h.tensors}]
    cut = base / untouched[-1]

    def shorten(*given, copy=os.copy_file_range):
        os.truncate(cut, 1000)
        return copy(*given)

    monkeypatch.setattr(os, "copy_file_range", shorten)
    with pytest.raises(LexigraftError, match="became shorter") as fault:
        graft(base, vocab, output=tmp_path / "out")
    assert cut.name in fault.value.found
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def damaged(base: Path, kind: str) -> str:
    """Do one kind of damage to a checkpoint in shards; what the message must name."""
    checkpoint = Checkpoint.open(base)
    last = checkpoint.shards[-1]
    if kind == "header":
        os.truncate(base / last, 20)
        return last
    if kind == "truncated":
        os.truncate(base / last, (base / last).stat().st_size - 1)
        return "truncated"
    if kind == "missing":
        (base / last).unlink()
        return last
    index = json.loads((base / INDEX).read_text())
    if kind == "twice":
        first = next(name for name, h in checkpoint.headers.items() if len(h.tensors) > 1)
        shutil.copyfile(base / first, base / "model-stale.safetensors")
        tensor = checkpoint.headers[first].tensors[0].name
        index["weight_map"][tensor] = "model-stale.safetensors"
        named = f"{tensor} is both in"
    else:
        index["weight_map"]["model.nothing.weight"] = last
        named = "which no shard holds"
    (base / INDEX).write_text(json.dumps(index))
    return named


@pytest.mark.parametrize("kind", ["header", "truncated", "missing", "twice", "index"])
def test_damaged_checkpoints(kind, copied, tmp_path):
    base, vocab = copied
    named = damaged(base, kind)
    assert named in refused(base, vocab, tmp_path / "out").found


# -- memory


def holes(made: Path, base: Path, gigabytes: float) -> Path:
    """The tokenizer of `made` with four shards, whose layers are holes and take no room."""
    base.mkdir(exist_ok=True)
    for path in made.glob("tokenizer*"):
        shutil.copyfile(path, base / path.name)
    tokens, width = TokenMap.read(made).tokens, 1024
    rest = int(gigabytes * 1e9 / 4) // (2 * width)
    places = {}
    for i in range(4):
        name = f"model-{i + 1:05}-of-00004.safetensors"
        tensors = [(f"model.layers.{i}.mlp.up_proj.weight", "BF16", (rest, width))]
        if i == 0:
            tensors.append(("model.embed_tokens.weight", "BF16", (tokens, width)))
        head = header_bytes(tensors, {"format": "pt"})
        with (base / name).open("wb") as stream:
            stream.write(head)
            stream.truncate(len(head) + 2 * width * rest)
            if i == 0:
                stream.seek(0, os.SEEK_END)
                rows = np.random.default_rng(0).normal(size=(tokens, width))
                stream.write(rows.astype(ml_dtypes.bfloat16).tobytes())
        places |= dict.fromkeys((tensor for tensor, _, _ in tensors), name)
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = {"model_type": "llama", "vocab_size": tokens, "tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(config))
    return base


@pytest.mark.matrix
def test_memory_does_not_grow_with_the_checkpoint(made, tmp_path):
    code = (
        "import sys; from lexigraft.steps.graft import graft; import parts; "
        "graft(sys.argv[1], sys.argv[2], output=sys.argv[3]); print(parts.peak_megabytes())"
    )
    peaks = []
    for gigabytes in (0.5, 8):
        if shutil.disk_usage(tmp_path).free < 1.2e9 * gigabytes:
            pytest.skip(f"{gigabytes} GB do not fit on this disk")
        base, out = holes(made[0], tmp_path / "big", gigabytes), tmp_path / "out"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", code, base, made[1], out],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        shutil.rmtree(out)
        peaks.append(int(done.stdout))
    assert peaks[0] <= 250
    assert peaks[1] - peaks[0] < 64


# -- what a person sees


def on_a_terminal(code):
    """What `code` shows on standard error, without colours, and what it prints."""
    shown, printed = launching.on_a_terminal([sys.executable, "-c", code], "stderr")
    return re.sub(r"\x1b\[[0-9;]*m", "", shown), printed


def test_progress_shows_bytes_rate_and_time_left():
    """On a real terminal: a pseudo-terminal of our own."""
    text, _ = on_a_terminal(
        "import time; from lexigraft.console import progress\n"
        "with progress('writing weights', 10**9) as advance:\n"
        "    for _ in range(8): advance(10**8); time.sleep(0.15)\n"
    )
    assert "writing weights" in text
    assert re.search(r"\d+/1\.0 GB|\d+\.\d+/1\.0 GB", text)
    assert re.search(r"[\d.]+ [MG]B/s", text)
    assert re.search(r"0:00:0\d", text)


def test_a_wait_whose_end_is_unknown_shows_its_time_and_makes_room_for_bars():
    text, printed = on_a_terminal(
        "import time; from lexigraft.console import note, progress, working\n"
        "@working('measuring')\n"
        "def measure(): time.sleep(0.3); return 'measured'\n"
        "@working('evaluating')\n"
        "def evaluate():\n"
        "    time.sleep(1.2)\n"
        "    with progress('reading', 10**6) as advance: advance(10**6); time.sleep(0.3)\n"
        "    note('a notice'); print(measure()); time.sleep(0.3)\n"
        "for _ in range(2): evaluate()\n"
    )
    assert re.search(r"evaluating 0:00:0[1-9]", text)
    places = [text.index(word) for word in ("evaluating", "reading", "a notice", "measuring")]
    assert places == sorted(places)
    assert text.rindex("evaluating") > text.rindex("measuring")  # it came back
    assert printed == "measured\nmeasured\n"


VERBS = {  # the command, then what it waits for
    "learn": (
        "learn('BASE', corpus=['field.txt'], tokens=6, workers=1, output='OUT')",
        "proving the tokenizer on texts",
    ),
    "graft": ("graft('BASE', 'VOCAB', output='OUT')", "writing weights"),
    "train": (
        "train('BASE', corpus=['field.txt'], max_bytes=4000, block_size=64, output='OUT')",
        "packing texts", "measuring the base", "measuring held-out text", "training",
    ),
    "extract": ("extract('TUNED', base='BASE', rank=2, output='OUT')", "extracting"),
}  # fmt: skip


@pytest.mark.parametrize(
    "verb",
    [pytest.param(v, marks=[] if v in ("learn", "graft") else pytest.mark.matrix) for v in VERBS],
)
def test_a_wait_whose_end_is_known_shows_a_bar_with_rate_and_time_left(verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = parts.write_byte_level(Path("BASE"))
    parts.write_model(base, tokens=382, tied=True)
    if verb == "graft":
        extend(base, Path("VOCAB"), 5)
    if verb == "extract":
        parts.write_model(shutil.copytree(base, Path("TUNED")), tokens=382, tied=True, seed=1)
    Path("field.txt").write_text(parts.corpus_text(documents=120), "utf-8")
    call, *waits = VERBS[verb]
    text, _ = on_a_terminal(f"import lexigraft; lexigraft.{call}")
    counted = r"([\d.,]+)/([\d.,]+) (?:\S*B |bytes )?"
    rate_and_time = r"(?:\?|[\d.,]+ (?:\S*B|bytes|matrices)/s) \d:\d\d:\d\d"
    for label in waits:
        bars = re.findall(rf"{label} +[━╸╺ ]+{counted}{rate_and_time}", text)
        shares = [float(a.replace(",", "")) / float(b.replace(",", "")) for a, b in bars]
        assert max(shares) > 0.9, label  # the last document is cut before the last word
