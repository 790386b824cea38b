"""Field reports, stages 5 and 6: merging adapters and whole models.

One test for each report that no other test tells, by its number, on a small real repro.
"""

# ruff: noqa: N802 - the reports are numbered with a capital B

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import adapter_parts
import parts
from adapter_parts import ADDED, TOKENS
from lexigraft import (
    LexigraftError,
    blend,
    check,
    extract,
    families,
    graft,
    learn,
    merge,
    prune,
    split,
)
from lexigraft.checkpoints.checkpoint import INDEX
from lexigraft.errors import RefusalError
from lexigraft.families import TokenMap
from lexigraft.families.measure import new_ids
from lexigraft.manifest import Manifest

ROWS = TOKENS + ADDED
EMBED = "model.embed_tokens.weight"


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def table(folder, name=EMBED):
    return adapter_parts.load(folder).state_dict()[name]


# --- stage 5: adapters ---------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", ["plain", "saved-both", "lora-both", "rows-both", "rows-only"])
def test_B49_every_form_merges_into_the_ungrafted_base_and_rows_are_told(tmp_path, form, tied):
    scene = adapter_parts.scene(tmp_path, form, tied=tied)
    result = merge(scene.base, scene.adapter, output=tmp_path / "merged")
    unmerged = adapter_parts.unmerged(scene.grafted, scene.adapter)
    expected = adapter_parts.logits(unmerged, ROWS)
    got = adapter_parts.logits(adapter_parts.load(tmp_path / "merged"), ROWS)
    assert (got - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    assert (result.rows, result.tokens) == (ROWS, ROWS)
    assert config_of(tmp_path / "merged")["vocab_size"] == ROWS
    assert all("the adapter's" in line for line in result.sources)


def test_B50_B51_an_adapter_that_was_shrunk_leaves_the_padded_rows(tmp_path):
    base = adapter_parts.write_base(tmp_path / "base", tied=False, rows=448)
    grafted = adapter_parts.write_grafted(base, tmp_path / "grafted", rows=ROWS)
    adapter = adapter_parts.write_adapter(base, grafted, tmp_path / "adapter", "saved-both")
    result = merge(base, adapter, output=tmp_path / "merged")
    assert result.rows == config_of(tmp_path / "merged")["vocab_size"] == 448
    assert torch.equal(table(tmp_path / "merged")[ROWS:], table(base)[ROWS:])
    result = check(tmp_path / "merged")
    (padding,) = [f.found for f in result.findings if f.code == "LG303"]
    assert padding == "64 rows beyond the 384 tokens: normal padding"
    assert result.ok


def test_B50_asked_by_name_rows_that_the_training_cut_off_are_left_out(tmp_path):
    base = adapter_parts.write_base(tmp_path / "base", tied=False, rows=448)
    grafted = adapter_parts.write_grafted(base, tmp_path / "grafted", rows=ROWS)
    adapter = adapter_parts.write_adapter(base, grafted, tmp_path / "adapter", "lora-both")
    merge(base, adapter, output=tmp_path / "whole")
    result = merge(base, adapter, trim=True, prove=True, output=tmp_path / "merged")
    assert result.rows == config_of(tmp_path / "merged")["vocab_size"] == ROWS
    assert result.difference < 1e-4
    whole, ours = (adapter_parts.tensors(tmp_path / name) for name in ("whole", "merged"))
    for name, tensor in whole.items():
        rows = ROWS if name in (EMBED, "lm_head.weight") else len(tensor)
        assert torch.equal(ours[name], tensor[:rows]), name
    assert Manifest.read(tmp_path / "merged").last("merge").trimmed
    assert check(tmp_path / "merged", base=base).ok
    for name in ("config.json", "generation_config.json"):
        content = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(content | {"pad_token_id": 400}))
    with pytest.raises(LexigraftError, match=r"id 400 of .* is in use"):
        merge(base, adapter, trim=True, output=tmp_path / "no")
    with pytest.raises(LexigraftError, match="has 384 rows, the base has 384"):
        merge(grafted, adapter, trim=True, output=tmp_path / "no")
    with pytest.raises(RefusalError, match="--trim with"):
        merge(base, [adapter, adapter], trim=True, output=tmp_path / "no")


def test_B53_swapped_tokenizers_of_a_stack_are_named(tmp_path, capsys):
    """The first adapter's folder holds the second one's tokenizer, with one token more; or the
    second the first one's: rows beyond the tokens may be padding, so that is told, not refused."""
    first = adapter_parts.scene(tmp_path / "1", "saved-both", tied=False)
    adapter_parts.extended_tokenizer(first.base, first.adapter, added=ADDED + 1)
    file = first.adapter / "tokenizer.json"
    with pytest.raises(
        LexigraftError, match=f"has {ROWS} rows for a tokenizer of {ROWS + 1} tokens .{file}"
    ):
        merge(first.base, first.adapter, output=tmp_path / "merged")
    adapter_parts.extended_tokenizer(first.base, first.adapter, added=ADDED - 1)
    merge(first.base, first.adapter, output=tmp_path / "merged")
    told = " ".join(capsys.readouterr().err.split())
    assert f"has {ROWS} rows, {file} {ROWS - 1} tokens: the rows beyond" in told


def test_B53_adapters_of_a_stack_go_in_in_the_order_of_their_training(tmp_path, capsys):
    """What the second was trained on is known from its manifest alone: it has LoRA only."""
    scene = adapter_parts.scene(tmp_path, "saved-both", tied=False)
    merge(scene.base, scene.adapter, output=tmp_path / "once")
    second = adapter_parts.write_adapter(
        tmp_path / "once", tmp_path / "once", tmp_path / "second", "lora"
    )
    shutil.copyfile(tmp_path / "once" / "lexigraft.json", second / "lexigraft.json")
    for adapters, named in (
        ([second, scene.adapter], str(scene.adapter)),
        ([second], "an adapter whose weights have sha256"),
    ):
        with pytest.raises(LexigraftError, match="was trained on a model into which") as caught:
            merge(scene.base, adapters, output=tmp_path / "no")
        assert named in caught.value.found
    merge(scene.base, [scene.adapter, second], output=tmp_path / "stack")
    merge(tmp_path / "once", second, output=tmp_path / "twice")
    stack, twice = (adapter_parts.tensors(tmp_path / name) for name in ("stack", "twice"))
    assert all(torch.equal(stack[name], tensor) for name, tensor in twice.items())
    capsys.readouterr()
    (tmp_path / "once" / "lexigraft.json").unlink()  # saved again by another program
    merge(tmp_path / "once", second, output=tmp_path / "again")
    assert "is unknown" in capsys.readouterr().err


def sibling(root, name, text):
    folder = root / name
    (root / f"{name}.txt").write_text(text, "utf-8")
    learn(root / "base", corpus=[root / f"{name}.txt"], tokens=20, min_count=5, output=folder)
    return folder


@pytest.fixture(scope="module")
def siblings(tmp_path_factory):
    """A base, two vocabularies of it, and the models and adapters of both."""
    root = tmp_path_factory.mktemp("siblings")
    base = adapter_parts.write_base(root / "base", tied=True)
    other = parts.corpus_text(1).replace("itis", "ysis").replace("炎", "癌")
    for name, text in (("x", parts.corpus_text(0)), ("y", other)):
        vocab = sibling(root, name, text)
        graft(base, vocab, output=root / f"m{name}", pad_to=1)
        adapter_parts.write_adapter(base, root / f"m{name}", root / f"a{name}", "saved-shared")
        for file in ("lexigraft.json", "new_tokens.jsonl"):  # as `train` leaves them
            shutil.copyfile(root / f"m{name}" / file, root / f"a{name}" / file)
    return root


def test_B54_an_adapter_of_a_sibling_vocabulary_is_refused_or_moved_by_text(siblings, tmp_path):
    root = siblings
    with pytest.raises(LexigraftError, match=r"id 3\d\d is") as caught:
        merge(root / "mx", root / "ay", output=tmp_path / "no")
    assert "rows belong to ids" in caught.value.needed
    assert "--remap" in caught.value.fix
    assert merge(root / "mx", root / "ay", remap=True, output=tmp_path / "moved").tied
    merge(root / "base", root / "ay", output=tmp_path / "own")
    ids, own = TokenMap.read(tmp_path / "moved"), TokenMap.read(tmp_path / "own")
    assert TokenMap.read(root / "mx").texts.items() <= ids.texts.items()
    moved, theirs = table(tmp_path / "moved"), table(tmp_path / "own")
    for text, place in own.ids.items():
        assert torch.equal(moved[ids.ids[text]], theirs[place]), text
    of_x_alone = [i for i, text in ids.texts.items() if text not in own.ids]
    assert of_x_alone
    assert torch.equal(moved[of_x_alone], table(root / "mx")[of_x_alone])
    new = new_ids(tmp_path / "moved", families.load(tmp_path / "moved"))
    assert list(new) == list(range(TOKENS, ids.tokens))


def test_B54_the_body_of_a_sibling_s_adapter_can_go_in_alone(siblings, tmp_path, capsys):
    """Asked for by name: the rows and the tokenizer of the expanded model stay as they are."""
    model, adapter = siblings / "mx", shutil.copytree(siblings / "ay", tmp_path / "ay")
    merge(siblings / "base", adapter, output=tmp_path / "own")
    (adapter / "tokenizer.json").unlink()  # which nobody needs here
    result = merge(model, adapter, body_only=True, output=tmp_path / "body")
    assert "left out of" in capsys.readouterr().err
    ours, theirs = (adapter_parts.tensors(tmp_path / name) for name in ("body", "own"))
    before = adapter_parts.tensors(model)
    assert ours.keys() == before.keys()
    assert torch.equal(ours.pop(EMBED), before[EMBED])
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert result.tied
    for file in ("tokenizer.json", "new_tokens.jsonl"):
        assert (tmp_path / "body" / file).read_bytes() == (model / file).read_bytes()
    *records, record = Manifest.read(tmp_path / "body").records
    assert records == Manifest.read(model).records
    assert record.body_only
    assert new_ids(tmp_path / "body", families.load(tmp_path / "body")).first == TOKENS
    assert check(tmp_path / "body").ok
    merge(model, [adapter, adapter], weights=[1, 0], body_only=True, output=tmp_path / "two")
    both = adapter_parts.tensors(tmp_path / "two")
    assert torch.equal(both.pop(EMBED), before[EMBED])
    assert all(torch.allclose(tensor, ours[name], atol=1e-6) for name, tensor in both.items())


def test_B54_a_body_alone_is_refused_where_there_is_none(tmp_path):
    scene = adapter_parts.scene(tmp_path, "rows-only", tied=True)
    with pytest.raises(RefusalError, match="changes only vocabulary tensors"):
        merge(scene.base, scene.adapter, body_only=True, output=tmp_path / "merged")
    with pytest.raises(RefusalError, match="--body-only with --remap or --tokenizer"):
        merge(scene.base, scene.adapter, body_only=True, remap=True, output=tmp_path / "merged")


def test_B55_an_old_adapter_leaves_new_rows_of_a_grown_model(tmp_path):
    base = adapter_parts.write_base(tmp_path / "base", tied=False)
    adapter = adapter_parts.write_adapter(base, base, tmp_path / "adapter", "lora-both")
    grown = adapter_parts.write_grafted(base, tmp_path / "grown")
    merge(grown, adapter, output=tmp_path / "merged")
    merge(base, adapter, output=tmp_path / "old")
    for name in (EMBED, "lm_head.weight"):
        merged = table(tmp_path / "merged", name)
        assert torch.equal(merged[TOKENS:], table(grown, name)[TOKENS:])
        assert torch.equal(merged[:TOKENS], table(tmp_path / "old", name))


def test_B60_shards_and_index_hold_the_new_rows(tmp_path):
    scene = adapter_parts.scene(tmp_path, "saved-both", tied=False, shards=True)
    merge(scene.base, scene.adapter, output=tmp_path / "merged")
    index = json.loads((tmp_path / "merged" / INDEX).read_text())
    held = {}
    for name in set(index["weight_map"].values()):
        held |= dict.fromkeys(load_file(tmp_path / "merged" / name), name)
        sizes = [t.nbytes for t in load_file(tmp_path / "merged" / name).values()]
        index["metadata"]["total_size"] -= sum(sizes)
    assert held == index["weight_map"]
    assert index["metadata"]["total_size"] == 0
    assert table(tmp_path / "merged").shape[0] == ROWS


def test_B61_every_key_of_a_config_that_changes_is_listed(tmp_path, capsys):
    scene = adapter_parts.scene(tmp_path, "saved-both", tied=True)
    path = scene.adapter / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|im_end|>"}))
    (scene.adapter / "chat_template.jinja").write_text("{{ messages }}<|im_end|>")
    merge(scene.base, scene.adapter, output=tmp_path / "merged")
    told = capsys.readouterr().err
    for name in ("config.json", "generation_config.json"):
        before, after = (
            json.loads((folder / name).read_text()) for folder in (scene.base, tmp_path / "merged")
        )
        line = next(line for line in told.splitlines() if f"{name}: " in line)
        changed = {key for key in before | after if before.get(key) != after.get(key)}
        assert "eos_token_id" in changed
        assert all(f"{key} " in line for key in changed), line
    assert "vocab_size 372 -> 384" in told
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        ours = (tmp_path / "merged" / name).read_bytes()
        assert ours == (scene.adapter / name).read_bytes()


def test_B62_tensors_of_an_ungathered_save_are_named(tmp_path):
    scene = adapter_parts.scene(tmp_path, "saved-both", tied=False)
    path = scene.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.embed_tokens.weight"] = np.zeros(0, np.float32)
    save_file(tensors, path)
    with pytest.raises(LexigraftError, match="without gathering") as caught:
        merge(scene.base, scene.adapter, output=tmp_path / "merged")
    assert "zero_to_fp32" in caught.value.fix


def test_B63_a_16_bit_base_is_added_to_in_float32_and_rounded_once(tmp_path):
    """And the largest error of that rounding is told, whether or not logits are compared."""
    scene = adapter_parts.scene(tmp_path, "lora", tied=True, dtype="bfloat16", whole=False)
    result = merge(scene.grafted, scene.adapter, output=tmp_path / "merged")
    tensors = load_file(scene.adapter / "adapter_model.safetensors")
    errors = []
    for key in [key for key in tensors if key.endswith("lora_A.weight")]:
        a, b = (torch.from_numpy(tensors[key.replace("lora_A", f"lora_{x}")]) for x in "AB")
        name = key.removeprefix("base_model.model.").replace(".lora_A", "")
        start, ours = (table(folder, name) for folder in (scene.grafted, tmp_path / "merged"))
        exact = start.float() + 2.0 * (b @ a)
        assert torch.equal(ours, exact.bfloat16())
        errors.append(float((exact - ours.float()).abs().max()))
    assert result.rounding == result.to_json()["max_rounding_error"] == max(errors) > 0
    assert f"{max(errors):.1e}" in "".join(result.lines())


def test_B63_the_error_of_rounding_is_told_of_every_kind_of_merge(tmp_path):
    scene = adapter_parts.scene(tmp_path, "dora-both", tied=False, dtype="bfloat16", whole=False)
    results = [
        merge(scene.grafted, scene.adapter, output=tmp_path / "dora"),
        merge(scene.grafted, [scene.adapter] * 2, weights=[1, 1], output=tmp_path / "weighted"),
    ]
    assert all(1e-4 < result.rounding < 0.1 for result in results)
    wide = adapter_parts.scene(tmp_path / "wide", "lora", tied=True, whole=False)
    assert merge(wide.grafted, wide.adapter, output=tmp_path / "float32").rounding is None


def test_B64_weights_act_where_the_adapter_has_the_token(siblings, tmp_path):
    root = siblings
    merge(root / "base", [root / "ax", root / "ay"], weights=[1, 0], output=tmp_path / "b")
    merge(root / "base", root / "ax", output=tmp_path / "x")
    ids, own = TokenMap.read(tmp_path / "b"), TokenMap.read(tmp_path / "x")
    both, alone = table(tmp_path / "b"), table(tmp_path / "x")
    for text, place in own.ids.items():
        assert torch.equal(both[ids.ids[text]], alone[place]), text


def test_B64_tokens_that_several_adapters_have_trained_are_told(siblings, tmp_path, capsys):
    root = siblings
    adapters = [root / "ax", root / "ay"]
    merge(root / "base", adapters, weights=[1, 0], output=tmp_path / "one")
    assert "several adapters" not in capsys.readouterr().err  # of one with weight 0 nothing goes in
    merge(root / "base", adapters, weights=[1, 1], output=tmp_path / "b")
    own = [TokenMap.read(folder) for folder in adapters]
    both = [t for t in own[0].ids if own[0].ids[t] >= TOKENS and t in own[1].ids]
    told = " ".join(capsys.readouterr().err.split())
    assert f"{len(both)} new tokens have rows in several adapters" in told
    ids = TokenMap.read(tmp_path / "b").ids
    assert all(repr(text) in told for text in sorted(both, key=ids.__getitem__)[:5])


# --- stage 6: whole models -----------------------------------------------------------------------


def test_B65_an_extra_token_that_the_base_has_elsewhere_is_one_token(tmp_path):
    """One of the larger model's added tokens stands in the base under another id."""
    base = parts.write_byte_level(tmp_path / "base", vocab_size=330)
    parts.write_model(base, tokens=330)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    data = json.loads((other / "tokenizer.json").read_text())
    (moved,) = [text for text, place in data["model"]["vocab"].items() if place == 300]
    data["model"]["vocab"][moved] = 337
    data["added_tokens"] += [
        {**data["added_tokens"][0], "id": place, "content": f"<|{place}|>"}
        for place in (300, *range(330, 337))
    ]
    data["model"]["vocab"] |= {token["content"]: token["id"] for token in data["added_tokens"]}
    (other / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False))
    model = adapter_parts.load(base)
    model.resize_token_embeddings(338, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight[337] = module.weight[300]
            module.weight[300] = 7.0
    model.save_pretrained(other)
    blend([base, other], base=base, method="linear", output=tmp_path / "b")
    ids = TokenMap.read(tmp_path / "b")
    assert ids.texts[300] == moved
    assert torch.equal(table(tmp_path / "b")[:330], table(base))
    assert torch.all(table(tmp_path / "b")[ids.ids["<|300|>"]] == 7.0)
    assert ids.tokens == 330 + 8


def test_B67_padding_is_kept(tmp_path):
    base = adapter_parts.write_base(tmp_path / "base", tied=True, rows=448)
    blend([base, base], base=base, method="linear", output=tmp_path / "b")
    assert torch.equal(table(tmp_path / "b"), table(base))
    assert config_of(tmp_path / "b")["vocab_size"] == 448


def test_B68_a_row_that_is_no_number_stops_the_blend(tmp_path):
    base = adapter_parts.write_base(tmp_path / "base", tied=True)
    other = shutil.copytree(base, tmp_path / "other")
    row = np.full(table(base).shape[1], np.nan, np.float32)
    parts.overwrite_row(other, EMBED, 371, row.tobytes())
    with pytest.raises(LexigraftError, match=f"{EMBED} is not finite") as caught:
        blend([base, other], base=base, method="task", output=tmp_path / "b")
    text = TokenMap.read(base).texts.get(371)
    where = f"the row of {text!r}" if text else "row 371"
    assert caught.value.found.endswith(f"in {where} of {other}")
    assert not list(tmp_path.glob("b.*"))


@pytest.mark.matrix
def test_B70_every_format_of_the_base_holds_the_union(siblings, tmp_path):
    base = parts.write_sentencepiece(tmp_path / "base")
    parts.write_model(base, tokens=400)
    for name in "xy":
        text = (siblings / f"{name}.txt").read_text("utf-8")
        (tmp_path / f"{name}.txt").write_text(text, "utf-8")
        vocab = tmp_path / f"v{name}"
        learn(base, corpus=[tmp_path / f"{name}.txt"], tokens=20, min_count=5, output=vocab)
        graft(base, vocab, output=tmp_path / f"m{name}")
    models = [tmp_path / "mx", tmp_path / "my"]
    result = blend(models, base=base, method="linear", output=tmp_path / "b")
    assert {"tokenizer.model", "tokenizer.json"} <= {f.name for f in (tmp_path / "b").iterdir()}
    told = result.to_json()["formats"]
    assert {"tokenizer.model", "tokenizer.json"} <= set(told["files"])
    assert str(base) in told["why"] and told["why"] in "".join(result.lines())
    assert check(tmp_path / "b").ok


def test_B70_nested_configs_state_the_rows_of_the_union(siblings, tmp_path):
    from test_merge import image_text_model

    _, base = image_text_model(tmp_path / "base")
    graft(base, siblings / "x", output=tmp_path / "grown")
    result = blend([tmp_path / "grown", base], base=base, method="linear", output=tmp_path / "b")
    assert f"copied from {tmp_path / 'grown'}" in "".join(result.lines())
    config = config_of(tmp_path / "b")
    assert config["text_config"]["vocab_size"] == result.rows > TOKENS
    assert "vocab_size" not in config
    assert check(tmp_path / "b").ok


def test_permuted_tokenizers_of_equal_size_are_caught_everywhere(tmp_path):
    """By every verb that takes two of model, vocabulary and adapter; `blend` and `align` go by text
    (test_ids_of_equal_number_that_mean_other_words_are_aligned_not_averaged)."""
    scene = adapter_parts.scene(tmp_path, "saved-both", tied=True)
    other = shutil.copytree(scene.base, tmp_path / "other")
    data = json.loads((other / "tokenizer.json").read_text())
    one, two = (next(t for t, i in data["model"]["vocab"].items() if i == n) for n in (290, 310))
    data["model"]["vocab"] |= {one: 310, two: 290}
    (other / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False))
    assert TokenMap.read(other).tokens == TokenMap.read(scene.base).tokens
    with pytest.raises(LexigraftError, match="id 290 is"):
        merge(other, scene.adapter, output=tmp_path / "o")
    with pytest.raises(LexigraftError, match="id 290 is"):
        merge(scene.base, scene.adapter, tokenizer=other, output=tmp_path / "o")
    with pytest.raises(LexigraftError, match="id 290 is"):
        graft(
            scene.base,
            adapter_parts.extended_tokenizer(other, tmp_path / "v"),
            output=tmp_path / "o",
        )
    (tmp_path / "text.txt").write_text(parts.corpus_text(documents=5), "utf-8")
    for verb in (
        lambda: merge(other, [scene.adapter] * 2, weights=[0.5, 0.5], output=tmp_path / "o"),
        lambda: split(other, scene.adapter, output=tmp_path / "o"),
        lambda: extract(scene.grafted, base=other, output=tmp_path / "o"),
        lambda: prune(
            adapter_parts.extended_tokenizer(other, scene.grafted),
            corpus=[tmp_path / "text.txt"],
            adapters=[scene.adapter],
            output=tmp_path / "o",
        ),
    ):
        with pytest.raises(LexigraftError, match="id 290 is"):
            verb()
    assert "LG601" in {f.code for f in check(scene.grafted, base=scene.base).findings}
    assert "LG404" in {f.code for f in check(other, adapter=scene.adapter).findings}
    assert "LG404" in {f.code for f in check(scene.adapter, base=other).findings}
    assert not (tmp_path / "o").exists()


# Where a report is told by tests that are about more than it.
ELSEWHERE = {
    "B52": ("test_merge.py", "test_rows_are_those_of_the_adapter_not_of_its_tokenizer"),
    "B56": ("test_adapters.py", "test_three_copies_of_a_saved_module_are_one_change"),
    "B57": ("test_merge.py", "test_an_embedding_and_its_tied_head_trained_in_two_ways"),
    "B69": ("test_extract.py", "test_extract_and_merge_give_rows_exactly_and_the_rest_within"),
    "B74": ("test_llama_cpp.py", "test_the_simulation_reads_as_sentencepiece_does"),
    "B75": ("test_llama_cpp.py", "test_tokens_that_change_the_check_text_are_found"),
    "B83": ("test_check_gallery.py", "a_class_that_the_installed_versions_build_otherwise"),
}
REPORTS = """
    49 50 51 52 53 54 55 56 57 60 61 62 63 64 65 67 68 69 70 71 72 74 75 76 77 78 80 81 82 83 84
"""


def test_every_report_of_stages_5_to_8_has_a_test():
    folder = Path(__file__).parent
    own = "".join(path.read_text() for path in folder.glob("test_field_reports_*.py"))
    told = {f"B{number}" for names in re.findall(r"def test(?:_B\d\d)+", own)
            for number in re.findall(r"B(\d\d)", names)}  # fmt: skip
    for file, name in ELSEWHERE.values():
        assert f"def {name}" in (folder / file).read_text(), name
    assert {f"B{number}" for number in REPORTS.split()} == told | ELSEWHERE.keys()
