"""Field reports, stages 7 and 8: what exporters, servers and checkers run into is told before.

By the number of the report; what the gallery of `check` shows already is not shown again.
"""

# ruff: noqa: N802 - the reports are numbered with a capital B

from __future__ import annotations

import json
import shutil

import pytest

from lexigraft import LexigraftError, graft, merge
from lexigraft.manifest import Manifest
from lexigraft.steps.check import check
from test_check import TOKENS, edit, extend, grow_rows
from test_check_gallery import (  # noqa: F401 - a fixture
    EMBED,
    Ground,
    change,
    source,
    write_adapter,
)


@pytest.fixture
def ground(source, tmp_path):  # noqa: F811
    return Ground(source, tmp_path)


def by_code(result) -> dict:
    return {f.code: f for f in result.findings}


def test_B71_the_three_numbers_before_an_export(ground):
    """A token without a row, and rows without a token, which are named in the export alone."""
    grow_rows(ground.sp, 384)
    assert not {"LG911", "LG912", "LG913"} & by_code(check(ground.sp, consumer="gguf")).keys()
    extend(ground.base, ground.base)
    found = by_code(check(ground.base, consumer="gguf"))
    for number in ("360 rows", "366 tokens", "config.json says 360"):
        assert number in found["LG302"].found
    assert "loses 6 ids" in found["LG913"].found


def test_B72_added_tokens_that_the_converter_would_drop(ground):
    """Ids behind the model file are kept where config.json counts them, else named."""
    (ground.sp / "tokenizer.json").unlink()
    added = {"<s>": 1, "<human>": TOKENS, "<bot>": TOKENS + 1}
    (ground.sp / "added_tokens.json").write_text(json.dumps(added))
    assert "360 ('<human>'" in by_code(check(ground.sp, consumer="gguf"))["LG913"].found
    grow_rows(ground.sp, TOKENS + 2)
    assert "LG913" not in by_code(check(ground.sp, consumer="gguf"))


@pytest.mark.parametrize("consumer", ["gguf", "vllm", "tgi"])
def test_B76_rows_in_an_adapter_are_told_before_a_server_refuses_them(ground, consumer):
    found = [f for f in check(ground.adapter, consumer=consumer).findings if f.code > "LG9"]
    assert len(found) == 1 and "lexigraft split" in found[0].fix


def test_B77_rows_and_config_agree_and_are_a_multiple_of_64(ground, tmp_path):
    graft(ground.sp, ground.copy("vocab"), output=tmp_path / "model")
    result = check(tmp_path / "model", consumer="vllm")
    assert "LG924" not in by_code(result) and result.ok
    rows = {r.count for r in result.table if r.unit in ("rows", "vocab_size")}
    assert rows == {384}


def test_B78_base_tokens_max_id_and_rows_are_printed(ground, tmp_path):
    """The four numbers, and what ids without a text take of the probability.

    The report asks for less than 1e-6, which no finite row of a head without a bias guarantees: k
    rows at the mean of all take k / (V + k) at most (law 9), and a tiny model spreads its logits
    evenly. So what they take is measured on a text and held against that.
    """
    (tmp_path / "text.txt").write_text("the river and the hospital heart. " * 20)
    made = graft(
        ground.sp, ground.copy("vocab"), output=tmp_path / "model", probe=tmp_path / "text.txt"
    )
    assert made.probe is not None
    assert 0 < made.probe.padding.most <= 18 / 384
    result = check(tmp_path / "model", deep=True)
    shown = {line.split()[0]: " ".join(line.split()[1:]) for line in result.lines()}
    assert Manifest.read(tmp_path / "model").last("graft").base.tokens == TOKENS
    assert shown["lexigraft.json"].startswith("360 tokens ok of the base")
    assert (
        shown["tokenizer.json"].startswith("366 tokens")
        and "366 entries" in shown["tokenizer.json"]
    )
    assert shown["model.embed_tokens.weight"].startswith("384 rows padding")
    assert "LG707" not in by_code(result)  # padding rows are no longer than others


def test_B80_one_table_and_one_command(ground):
    edit(ground.base / "generation_config.json", pad_token_id=800)
    (ground.base / "chat_template.jinja").write_text("{{ messages }}")
    result = check(ground.base)
    parts = {row.part: row for row in result.table}
    assert {"tokenizer.json", "config.json vocab_size", "model.embed_tokens.weight"} <= parts.keys()
    assert parts["chat_template.jinja template"].detail == "chat template"
    assert "pad_token_id 800" in parts["generation_config.json"].detail
    assert parts["generation_config.json"].verdict == "error LG202"
    assert parts["tokenizer.json"].verdict == "ok"
    assert [f.code for f in result.findings if f.severity == "error"] == ["LG202"]
    assert all(f.fix for f in result.findings)


def test_B81_a_wrong_pairing_of_equal_sizes_is_an_error(ground, tmp_path):
    """Sizes agree; the token map does not. Nothing is resized to make it fit."""
    stranger = tmp_path / "stranger"
    shutil.copytree(ground.adapter, stranger)
    extend(ground.sp, stranger, skip=6)
    model = ground.sp
    extend(model, model)
    (model / "tokenizer.model").unlink()
    grow_rows(model, TOKENS + 6)
    assert "id 360" in by_code(check(model, adapter=stranger))["LG404"].found
    with pytest.raises(LexigraftError):
        merge(model, [stranger], output=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_B82_old_rows_that_changed_are_told_by_id(ground, tmp_path):
    """By the base where it is at hand, else by the hashes that `graft` wrote down."""
    model = tmp_path / "model"
    graft(ground.sp, ground.copy("vocab"), output=model)
    assert Manifest.read(model).last("graft").base_rows.keys() == {EMBED, "lm_head.weight"}
    for base in (ground.sp, None):
        assert "LG706" not in by_code(check(model, base=base, deep=True))

    def spoil(rows):
        rows = rows.clone()
        rows[[0, 5]] += 1
        return rows

    change(model, model__embed_tokens__weight=spoil)
    found = by_code(check(model, base=ground.sp, deep=True))["LG706"]
    assert found.where == EMBED
    assert found.found.startswith("2 of 360 old rows differ") and found.found.endswith("ids 0, 5")
    recorded = by_code(check(model, deep=True))["LG706"]
    assert recorded.where == EMBED and "not those that lexigraft.json records" in recorded.found


def test_B84_which_rows_count(ground):
    """rows >= tokens is fine, fewer is an error, and tables have to agree."""
    grow_rows(ground.sp, 384)
    assert check(ground.sp).ok
    verdicts = {row.part: row.verdict for row in check(ground.sp, adapter=ground.adapter).table}
    assert verdicts["model.embed_tokens.weight"] == "padding"
    assert verdicts["adapter_model.safetensors"].startswith("warning LG40")
    adapter = write_adapter(ground.sp.parent / "a", None, 384)
    assert check(ground.sp, adapter=adapter).ok
    small = write_adapter(ground.sp.parent / "b", None, TOKENS)
    assert "LG402" in by_code(check(ground.sp, adapter=small))
