"""Several adapters side by side, rows aligned by token text; adapters of sibling vocabularies."""

import pytest
import torch

import adapter_parts
import parts
from adapter_parts import ADDED, TOKENS
from lexigraft import check, graft, learn, merge
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families import load as load_tokenizer
from lexigraft.families.tokenmap import TokenMap
from lexigraft.manifest import Manifest


def tensors(folder):
    return adapter_parts.load(folder).state_dict()


def second_adapter(scene, root, form, seed=17):
    """Another adapter on the same grafted model."""
    folder = adapter_parts.write_adapter(scene.grafted, scene.grafted, root / "second", form)
    generator = torch.Generator().manual_seed(seed)
    adapter_parts.edit_tensors(
        folder,
        lambda old: {
            n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in old.items()
        },
    )
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("one", "other"), [("lora", "lora"), ("dora", "rows"), ("saved-both", "lora-embed")]
)
def test_weighted_adapters_are_the_weighted_sum_of_their_changes(tmp_path, one, other, tied):
    scene = adapter_parts.scene(tmp_path, one, tied=tied, whole=False)
    second = second_adapter(scene, tmp_path, other)
    result = merge(
        scene.grafted, [scene.adapter, second], weights=[0.7, -0.2], output=tmp_path / "both"
    )
    merge(scene.grafted, scene.adapter, output=tmp_path / "one")
    merge(scene.grafted, second, output=tmp_path / "other")
    base, first, then = (tensors(tmp_path / n) for n in ("grafted", "one", "other"))
    ours = tensors(tmp_path / "both")
    for name, weight in base.items():
        expected = weight + 0.7 * (first[name] - weight) - 0.2 * (then[name] - weight)
        assert torch.allclose(ours[name], expected, atol=1e-6), name
    assert result.rows == result.tokens == TOKENS + ADDED
    assert Manifest.read(tmp_path / "both").last("merge").weights == [0.7, -0.2]
    assert check(tmp_path / "both").ok


def test_weighted_lora_is_peft_s_concatenation(tmp_path):
    scene = adapter_parts.scene(tmp_path, "lora", tied=False, whole=False)
    second = second_adapter(scene, tmp_path, "lora")
    merge(scene.grafted, [scene.adapter, second], weights=[0.6, 0.3], output=tmp_path / "merged")
    model = adapter_parts.unmerged(scene.grafted, scene.adapter)
    model.load_adapter(second, "second")
    model.add_weighted_adapter(["default", "second"], [0.6, 0.3], "sum", combination_type="cat")
    model.set_adapter("sum")
    ours = adapter_parts.load(tmp_path / "merged")
    rows = TOKENS + ADDED
    difference = adapter_parts.logits(ours, rows) - adapter_parts.logits(model, rows)
    assert float(difference.abs().max()) < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["lora-both", "saved-both", "rows-both", "dora"])
def test_weight_1_is_a_merge_and_weight_0_changes_nothing(tmp_path, form, dtype):
    scene = adapter_parts.scene(tmp_path, form, tied=False, whole=False, dtype=dtype)
    second = second_adapter(scene, tmp_path, "lora")
    merge(scene.grafted, [scene.adapter, second], weights=[1, 0], output=tmp_path / "weighted")
    merge(scene.grafted, scene.adapter, output=tmp_path / "plain")
    plain, weighted = tensors(tmp_path / "plain"), tensors(tmp_path / "weighted")
    for name, tensor in plain.items():
        if form == "lora-both" and dtype == "bfloat16" and "embed" in name:
            # PEFT rounds what it adds to an embedding, and then the sum.
            assert torch.allclose(weighted[name], tensor, rtol=2**-7, atol=2e-3)
        else:
            assert torch.equal(weighted[name], tensor), name


@pytest.fixture(scope="module")
def siblings(tmp_path_factory):
    """Two vocabularies learned from two corpora on one base, each trained into rows and LoRA."""
    root = tmp_path_factory.mktemp("siblings")
    base = adapter_parts.write_base(root / "base", tied=True)
    texts = parts.corpus_text(0), parts.corpus_text(1).replace("itis", "ysis").replace("炎", "癌")
    for name, text in zip("ab", texts, strict=True):
        (root / f"{name}.txt").write_text(text, "utf-8")
        learn(base, corpus=[root / f"{name}.txt"], tokens=24, min_count=5, output=root / f"v{name}")
        graft(base, root / f"v{name}", output=root / f"m{name}", pad_to=1)
        form = "lora-embed" if name == "a" else "saved-shared"
        adapter_parts.write_adapter(base, root / f"m{name}", root / f"ad{name}", form)
    return root


def test_vocabularies_are_united_and_every_token_has_its_trained_rows(siblings, tmp_path):
    root = siblings
    result = merge(
        root / "base", [root / "ada", root / "adb"], weights=[0.5, 0.25], output=tmp_path / "m"
    )
    merge(root / "base", root / "ada", output=tmp_path / "a")
    merge(root / "base", root / "adb", output=tmp_path / "b")
    names = ("m", "a", "b")
    maps = [TokenMap.read(tmp_path / name) for name in names]
    merged, of_a, of_b = (tensors(tmp_path / n)["model.embed_tokens.weight"] for n in names)
    base = tensors(root / "base")["model.embed_tokens.weight"]
    both = maps[1].ids.keys() & maps[2].ids.keys() - TokenMap.read(root / "base").ids.keys()
    assert 0 < len(both) < 24
    assert result.tokens == TOKENS + 48 - len(both)
    assert result.rows % 64 == 0
    for token_id, text in maps[0].texts.items():
        rows = [
            (weight, table[tokens.ids[text]])
            for weight, table, tokens in ((0.5, of_a, maps[1]), (0.25, of_b, maps[2]))
            if text in tokens.ids
        ]
        if token_id < TOKENS:
            expected = base[token_id] + sum(w * (row - base[token_id]) for w, row in rows)
        else:
            expected = sum(w * row for w, row in rows) / sum(w for w, _ in rows)
        assert torch.allclose(merged[token_id], expected, atol=1e-6), text
    tokenizer = load_tokenizer(tmp_path / "m")
    new = [i for i in maps[0].texts if i >= TOKENS]
    assert all(tokenizer.pieces(maps[0].texts[i]) == [i] for i in new)
    assert not any(i in maps[0].added for i in new)
    assert check(tmp_path / "m").ok


def test_new_rows_whose_weights_cancel_are_refused(siblings, tmp_path):
    root = siblings
    with pytest.raises(RefusalError, match=r"the new token .* sum to -0\.5"):
        merge(root / "base", [root / "ada", root / "adb"], weights=[1, -1.5], output=tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", ["lora-both", "saved-both", "rows-only", "plain"])
def test_an_adapter_of_permuted_ids_is_moved_by_text(tmp_path, form, tied):
    scene = adapter_parts.scene(tmp_path, form, tied=tied, whole=form != "rows-only")
    other, order = adapter_parts.permuted(scene.base, tmp_path / "other")
    with pytest.raises(LexigraftError, match="id 260 is"):
        merge(other, scene.adapter, output=tmp_path / "no")
    merge(other, scene.adapter, remap=True, output=tmp_path / "moved")
    merge(scene.base, scene.adapter, output=tmp_path / "plain")
    plain, moved = tensors(tmp_path / "plain"), tensors(tmp_path / "moved")
    ids, own = TokenMap.read(tmp_path / "moved"), TokenMap.read(tmp_path / "plain")
    assert ids.ids.keys() == own.ids.keys()
    assert {t: i for t, i in ids.ids.items() if i < TOKENS} == TokenMap.read(other).ids
    there = torch.tensor([own.ids[ids.texts[i]] for i in range(ids.tokens)])
    for name, tensor in plain.items():
        expected = (
            tensor[there] if name.endswith(("embed_tokens.weight", "lm_head.weight")) else tensor
        )
        assert torch.equal(moved[name][: len(expected)], expected), name
    assert check(tmp_path / "moved").ok


def test_rows_that_the_sibling_s_adapter_does_not_hold_are_refused_by_name(tmp_path):
    scene = adapter_parts.scene(tmp_path, "lora", tied=True, whole=False)
    other, _ = adapter_parts.permuted(scene.base, tmp_path / "other")
    with pytest.raises(LexigraftError, match="for 12 tokens that the base lacks"):
        merge(other, scene.adapter, remap=True, output=tmp_path / "moved")


def test_weights_are_as_many_as_adapters_and_no_proof_is_promised(tmp_path):
    scene = adapter_parts.scene(tmp_path, "lora", tied=True)
    for weights in ([], [1, 2], [float("nan")]):
        with pytest.raises(LexigraftError, match="--weights"):
            merge(scene.base, scene.adapter, weights=weights, output=tmp_path / "merged")
    for options in ({"weights": [1]}, {"remap": True}, {"body_only": True}):
        with pytest.raises(RefusalError, match="--prove with --weights, --remap or --body-only"):
            merge(scene.base, scene.adapter, prove=True, output=tmp_path / "merged", **options)
