"""`check` opens strangers' files: whatever is in them, it ends in findings or one clear message."""

from __future__ import annotations

import json

import pytest

from lexigraft.steps.check import check
from test_check_gallery import Ground, source  # noqa: F401 - a fixture


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
    assert sum(line.startswith(("error LG", "warning LG")) for line in lines) == 3
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


@pytest.mark.parametrize(("first", "stop"), [(360, 2**53), (-(2**53), 366), (366, 360)])
def test_ids_that_a_manifest_makes_up_are_bounded(source, tmp_path, first, stop):  # noqa: F811
    """They were held in memory, all of them, and `--deep` and `--for gguf` went through them."""
    ground = Ground(source, tmp_path)
    path = ground.model / "lexigraft.json"
    manifest = json.loads(path.read_text())
    for record in manifest["records"]:
        record |= {"first_id": first, "tokens": stop}
    path.write_text(json.dumps(manifest))
    assert check(ground.model, deep=True, consumer="gguf").table
