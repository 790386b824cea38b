"""What `check` reads and writes besides folders and lines: hub ids, GGUF headers, SARIF."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lexigraft.checkpoints.gguf_header import read_gguf_header
from lexigraft.checks.codes import CODES
from lexigraft.cli import app
from lexigraft.errors import LexigraftError
from lexigraft.steps.check import check
from test_check_gallery import Ground, source, vocab_size_raised_by_hand, written_gguf  # noqa: F401
from test_gguf_base import write_gguf


@pytest.fixture
def ground(source, tmp_path):  # noqa: F811 - a fixture
    return Ground(source, tmp_path)


# -- SARIF

# What the schema of SARIF 2.1.0 requires of each object that is written here, and the values that
# it allows (sarif-schema-2.1.0.json, `required` and `enum`).
REQUIRED = {
    "log": {"version", "runs"},
    "run": {"tool"},
    "tool": {"driver"},
    "driver": {"name"},
    "rule": {"id"},
    "result": {"message"},
    "text": {"text"},
}
LEVELS = {"none", "note", "warning", "error"}


def has(kind: str, value: dict) -> None:
    assert REQUIRED[kind] <= value.keys()


def test_sarif_is_what_the_standard_asks_for(ground):
    vocab_size_raised_by_hand(ground)
    (ground.base / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]\x1b[2J"}))
    done = CliRunner().invoke(app, ["check", str(ground.base), "--sarif"])
    assert done.exit_code == 1 and "\x1b" not in done.output
    log = json.loads(done.output)
    has("log", log)
    assert log["version"] == "2.1.0" and log["$schema"].endswith("sarif-schema-2.1.0.json")
    [run] = log["runs"]
    has("run", run)
    has("tool", run["tool"])
    driver = run["tool"]["driver"]
    has("driver", driver)
    for rule in driver["rules"]:
        has("rule", rule)
        for key in ("shortDescription", "fullDescription", "help"):
            has("text", rule[key])
        assert rule["defaultConfiguration"]["level"] in LEVELS
    assert {result["ruleId"] for result in run["results"]} == {"LG112", "LG201"}
    for result in run["results"]:
        has("result", result)
        has("text", result["message"])
        assert result["level"] == CODES[result["ruleId"]].severity in LEVELS
        assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        [location] = result["locations"]
        place = location["physicalLocation"]["artifactLocation"]["uri"]
        assert Path(place).is_file() and Path(place).parent == ground.base
        assert [one["name"] for one in location["logicalLocations"]] == [Path(place).name]


def test_sarif_of_a_healthy_folder_has_no_results(ground):
    done = CliRunner().invoke(app, ["check", str(ground.base), "--sarif"])
    [run] = json.loads(done.output)["runs"]
    assert done.exit_code == 0 and run["results"] == run["tool"]["driver"]["rules"] == []


def test_a_name_that_no_file_can_have_is_told_in_sarif(ground):
    """A tensor may be called what a file may not: the finding is placed in the folder."""
    name = "x" * 300
    tensors = load_file(ground.base / "model.safetensors")
    save_file(tensors | {name: torch.zeros(0, 4)}, ground.base / "model.safetensors")
    [result] = check(ground.base).to_sarif()["runs"][0]["results"]
    [location] = result["locations"]
    assert (result["ruleId"], location["logicalLocations"]) == ("LG307", [{"name": name}])
    assert location["physicalLocation"]["artifactLocation"]["uri"] == str(ground.base)


# -- hub ids


def cached(hub: Path, name: str, folder: Path) -> str:
    """Put a folder into a hub cache as huggingface_hub lays it out; the commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = hub / ("models--" + name.replace("/", "--"))
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "blobs").mkdir()
    (home / "snapshots" / commit).mkdir(parents=True)
    for place, path in enumerate(sorted(folder.iterdir())):
        (home / "blobs" / str(place)).write_bytes(path.read_bytes())
        link = home / "snapshots" / commit / path.name
        link.symlink_to(f"../../blobs/{place}")
    return commit


def test_a_hub_id_is_the_folder_in_the_cache(ground, tmp_path):
    hub = tmp_path / "hub"
    commit = cached(hub, "someone/tiny", ground.shards)
    script = (
        "import sys\nfrom lexigraft.steps.check import check\n"
        "result = check(sys.argv[1], base=sys.argv[1])\n"
        "print(result.ok, len(result.findings), result.table[0].folder, 'torch' in sys.modules)"
    )
    import os

    told = {}
    for name in ("someone/tiny", f"someone/tiny@{commit}"):
        done = subprocess.run(
            [sys.executable, "-c", script, name],
            capture_output=True, text=True, check=True, cwd=tmp_path,
            env={**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        told[name] = done.stdout.split()
    for name, (ok, findings, folder, torch_loaded) in told.items():
        assert (ok, findings, torch_loaded) == ("True", "0", "False")
        assert folder == name


def test_an_unknown_hub_id_is_one_clear_message(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LexigraftError, match="the hub gave no model"):
        check("someone/nothing-of-this-name")


# -- GGUF headers


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_a_header_says_what_the_gguf_package_says(ground, tmp_path, kind):
    """All of it: metadata, lists, shapes, types."""
    from gguf import GGUFReader

    path = write_gguf(tmp_path / "tiny.gguf", ground.sp, kind)
    header, reader = read_gguf_header(path), GGUFReader(path)
    theirs = {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
    assert dict(header.metadata) == theirs and len(theirs) > 10
    shapes = {tensor.name: tuple(map(int, tensor.shape[::-1])) for tensor in reader.tensors}
    assert {tensor.name: tensor.shape for tensor in header.tensors.values()} == shapes
    kinds = {tensor.name: int(tensor.tensor_type) for tensor in reader.tensors}
    assert {tensor.name: tensor.kind for tensor in header.tensors.values()} == kinds


def test_a_byte_level_file_and_its_base_agree(ground, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", ground.base, "Q8_0")
    result = check(path, base=ground.base)
    assert [f.code for f in result.findings] == []
    done = CliRunner().invoke(app, ["check", str(path), "--base", str(ground.base)])
    assert done.exit_code == 0 and "token_embd.weight" in done.output


def test_a_file_below_the_home_folder(ground, monkeypatch):
    path = written_gguf(ground)
    monkeypatch.setenv("HOME", str(path.parent))
    assert check(f"~/{path.name}").ok


@pytest.mark.parametrize(
    "bytes_at_24",
    [
        struct.pack("<Q", 2**63) + b"x" * 100,  # a key of exabytes
        struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, 2**60),  # so many texts
        struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 9, 1),  # a list of lists
        struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 0, 2**61),  # so many numbers
        struct.pack("<Q", 1) + b"k" + struct.pack("<I", 99),  # a type that is none
        struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 0),
        b"",
    ],
)
def test_hostile_headers_are_one_message_each(tmp_path, bytes_at_24):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + bytes_at_24 + bytes(8))
    with pytest.raises(LexigraftError) as fault:
        read_gguf_header(path)
    assert fault.value.needed and fault.value.fix


@pytest.mark.parametrize(
    "content", [b"", b"GG", b"GGUF", b"GGUF" + struct.pack("<I", 1), b"x" * 99]
)
def test_what_is_no_gguf_file_is_one_message(tmp_path, content):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    [fault] = check(path).findings
    assert fault.code == "LG801" and fault.fix


def test_lists_of_millions_are_refused_before_they_are_read(tmp_path):
    path = tmp_path / "x.gguf"
    with path.open("wb") as stream:
        stream.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1))
        stream.write(struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 0, 2**30))
        stream.truncate(2**31)
    with pytest.raises(LexigraftError, match="more than"):
        read_gguf_header(path)
