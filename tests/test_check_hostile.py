"""`check` opens strangers' files: whatever is in them, it ends in findings or one clear message."""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lexigraft.console import plain
from lexigraft.errors import LexigraftError
from lexigraft.steps.check import check
from test_check_gallery import Ground, source  # noqa: F401 - a fixture

ODD = (None, True, -1, 0, 2**31, 2**70, 1.5, float("inf"), "", "x", "\x1b[31m\n", [], [[]], {}, [{}], {"a": 1})  # fmt: skip
FOLDERS = ("base", "sp", "model", "adapter", "shards")
MUTANTS = 200


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to the parts of a JSON value; of long lists and maps the first few."""
    yield path
    if isinstance(value, dict):
        for key in list(value)[: 12 if len(value) > 80 else 80]:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for place in range(min(3, len(value))):
            yield from places(value[place], (*path, place))


def mutated(data: Any, draw: random.Random) -> Any:
    """`data` with one part replaced, removed, or under another key."""
    data = copy.deepcopy(data)
    path = draw.choice(list(places(data)))
    if not path:
        return draw.choice(ODD) if draw.random() < 0.2 else data
    inside = data
    for key in path[:-1]:
        inside = inside[key]
    if isinstance(inside, dict) and draw.random() < 0.2:
        inside[draw.choice(("", "\x1b]0;x\x07\n", "7", "vocab_size"))] = inside.pop(path[-1])
    else:
        inside[path[-1]] = draw.choice(ODD)
    return data


def mutate(path: Path, draw: random.Random) -> None:
    """Change one file: parts of its JSON or of its header, or some of its bytes."""
    times = draw.randint(1, 3)
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        for _ in range(times):
            content = mutated(content, draw)
        path.write_text(json.dumps(content))
        return
    data = bytearray(path.read_bytes())
    if path.suffix == ".safetensors" and draw.random() < 0.7:
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(bytes(data[8 : 8 + length]))
        for _ in range(times):
            header = mutated(header, draw)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
        return
    for _ in range(draw.randint(1, 8)):
        data[draw.randrange(min(len(data), 2000))] = draw.randrange(256)
    path.write_bytes(data[: draw.choice((len(data), len(data), len(data) // 2, 7))])


def one_mutant(source: Path, place: Path, draw: random.Random) -> str:  # noqa: F811
    ground = Ground(source, place)
    folder = ground.copy(draw.choice(FOLDERS))
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".model"))
    some = draw.sample(files, draw.randint(1, 3))
    for path in some:
        mutate(path, draw)
    what = f"{folder.name}/{', '.join(path.name for path in some)}"
    try:
        if folder.name == "adapter":
            result = check(ground.sp, adapter=folder, deep=True)
        else:
            base = draw.choice((None, ground.base))
            result = check(folder, base=base, deep=True)
        json.dumps(result.to_json())
        for line in result.lines():
            assert "\n" not in line and plain(line) == line, what
    except LexigraftError as fault:
        assert fault.needed and fault.fix
    except Exception as fault:
        raise AssertionError(f"{what}: {type(fault).__name__}: {fault}") from fault
    return what


def test_mutants_end_in_findings(source, tmp_path):  # noqa: F811
    """Seeded, so that a failure comes back; a longer run is `one_mutant` with other seeds."""
    for seed in range(MUTANTS):
        place = tmp_path / str(seed)
        one_mutant(source, place, random.Random(seed))
        shutil.rmtree(place, ignore_errors=True)


@pytest.mark.parametrize("deep", [101, 900, 100_000])
def test_a_config_nested_beyond_reason_is_one_finding(source, tmp_path, deep):  # noqa: F811
    base = Ground(source, tmp_path).base
    inside = json.loads((base / "config.json").read_text())
    text = json.dumps(inside)[:-1] + ', "text_config": ' + '{"a":' * deep + "1" + "}" * deep + "}"
    (base / "config.json").write_text(text)
    result = check(base)
    assert {f.code for f in result.findings} <= {"LG204", "LG301"} and not result.ok


def test_nothing_in_a_file_reaches_the_terminal_as_a_command(source, tmp_path):  # noqa: F811
    ground = Ground(source, tmp_path)
    escape = "\x1b]0;owned\x07\x9b2J\u202egnp\nerror"
    data = json.loads((ground.sp / "tokenizer.json").read_text())
    data["model"]["vocab"][escape] = data["model"]["vocab"].pop("▁the")
    (ground.sp / "tokenizer.json").write_text(json.dumps(data))
    (ground.sp / "tokenizer_config.json").write_text(json.dumps({"pad_token": escape + "2"}))
    (ground.sp / "generation_config.json").write_text("[" + escape)
    lines = check(ground.sp).lines()
    assert sum("LG" in line for line in lines) == 3
    assert not set("".join(lines)) & set("\x1b\x07\x9b\u202e\n")


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/x.safetensors", "a/b.safetensors",
                                  "..\\x.safetensors", ".hidden.safetensors", "x.bin", ""])  # fmt: skip
def test_no_index_leads_out_of_its_folder(source, tmp_path, name):  # noqa: F811
    shards = Ground(source, tmp_path).shards
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    [fault] = [f for f in check(shards).findings if f.code == "LG301"]
    assert "bare name" in fault.needed


@pytest.mark.parametrize("count", [2**31, 2**70, float("inf"), "9", None, -1])
def test_tokens_that_a_class_makes_up_are_bounded(source, tmp_path, count):  # noqa: F811
    sp = Ground(source, tmp_path).sp
    made_up = {"tokenizer_class": "T5Tokenizer", "extra_ids": count}
    (sp / "tokenizer_config.json").write_text(json.dumps(made_up))
    assert [f.code for f in check(sp).findings if f.severity == "error"] == ["LG101"]
