"""Field reports, stages 5 and 6: merging adapters and whole models.

One test for each report that no other test tells, by its number, on a small real repro.
"""

# ruff: noqa: N802 - the reports are numbered with a capital B

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import adapter_parts
import parts
from adapter_parts import ADDED, TOKENS
from lexigraft import LexigraftError, blend, check, families, graft, learn, merge
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
    assert check(tmp_path / "merged").ok


def test_B53_swapped_tokenizers_of_a_stack_are_named(tmp_path):
    """The first adapter's folder holds the second one's tokenizer, with one token more."""
    first = adapter_parts.scene(tmp_path / "1", "saved-both", tied=False)
    adapter_parts.extended_tokenizer(first.base, first.adapter, added=ADDED + 1)
    with pytest.raises(LexigraftError, match=f"has {ROWS} rows for a tokenizer of {ROWS + 1}"):
        merge(first.base, first.adapter, output=tmp_path / "merged")


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
    scene = adapter_parts.scene(tmp_path, "lora", tied=True, dtype="bfloat16", whole=False)
    merge(scene.grafted, scene.adapter, output=tmp_path / "merged")
    tensors = load_file(scene.adapter / "adapter_model.safetensors")
    module = "model.layers.0.self_attn.q_proj"
    a, b = (
        torch.from_numpy(tensors[f"base_model.model.{module}.lora_{x}.weight"]) for x in ("A", "B")
    )
    start, ours = (table(f, f"{module}.weight") for f in (scene.grafted, tmp_path / "merged"))
    assert torch.equal(ours, (start.float() + 2.0 * (b @ a)).bfloat16())


def test_B64_weights_act_where_the_adapter_has_the_token(siblings, tmp_path):
    root = siblings
    merge(root / "base", [root / "ax", root / "ay"], weights=[1, 0], output=tmp_path / "b")
    merge(root / "base", root / "ax", output=tmp_path / "x")
    ids, own = TokenMap.read(tmp_path / "b"), TokenMap.read(tmp_path / "x")
    both, alone = table(tmp_path / "b"), table(tmp_path / "x")
    for text, place in own.ids.items():
        assert torch.equal(both[ids.ids[text]], alone[place]), text


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
    with pytest.raises(LexigraftError, match=f"{EMBED} is not finite"):
        blend([base, other], base=base, method="task", output=tmp_path / "b")
    assert not list(tmp_path.glob("b.*"))


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
    blend(models, base=base, method="linear", output=tmp_path / "b")
    assert {"tokenizer.model", "tokenizer.json"} <= {f.name for f in (tmp_path / "b").iterdir()}
    assert check(tmp_path / "b").ok


def test_permuted_tokenizers_of_equal_size_are_caught_everywhere(tmp_path):
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
    found = check(scene.grafted, base=other)
    assert not found.ok
    assert not (tmp_path / "o").exists()
