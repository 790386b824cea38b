"""align: models on one vocabulary; each still is what it was (laws 1, 7 to 11, 15, 17)."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import adapter_parts
import parts
from adapter_parts import TOKENS
from lexigraft import align, blend, check, graft
from lexigraft.errors import LexigraftError, RefusalError
from lexigraft.families import load as load_tokenizer
from lexigraft.families.tokenmap import TokenMap, aligned
from lexigraft.manifest import Manifest
from test_merge import folder_hash

TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def tensors(folder):
    return adapter_parts.load(folder).state_dict()


def logits(folder, ids):
    with torch.no_grad():
        return adapter_parts.load(folder)(input_ids=ids).logits


def still_is(before, after):
    """The model says the same under its new ids, bit for bit, and its body is the same."""
    old, new = TokenMap.read(before), TokenMap.read(after)
    place = aligned(old, new)
    assert len(place) == len(old.texts)
    own = torch.tensor(sorted(place))
    moved = torch.tensor([place[i] for i in own.tolist()])
    torch.manual_seed(2)
    drawn = torch.randint(0, len(own), (2, 24))
    expected, found = logits(before, own[drawn])[..., own], logits(after, moved[drawn])[..., moved]
    assert torch.equal(found, expected)
    one, other = tensors(before), tensors(after)
    for name, tensor in one.items():
        if name in TABLES:
            assert torch.equal(other[name][moved], tensor[own]), name
        else:
            assert torch.equal(other[name], tensor), name


@pytest.fixture(scope="module")
def siblings(tmp_path_factory):
    """A base, two models with words of their own grown from it, and the base under other ids."""
    root = tmp_path_factory.mktemp("siblings")
    base = adapter_parts.write_base(root / "base", tied=True)
    texts = parts.corpus_text(0), parts.corpus_text(1).replace("itis", "ysis").replace("炎", "癌")
    for name, text in zip("ab", texts, strict=True):
        parts.lengthen(base, root / f"v{name}", text.split("\n\n"), tokens=24)
        graft(base, root / f"v{name}", output=root / name, pad_to=1)
    adapter_parts.permuted(base, root / "other")
    return root


def test_each_model_is_what_it_was_and_rows_mean_the_same_tokens(siblings, tmp_path):
    root = siblings
    before = [folder_hash(root / name) for name in "ab"]
    result = align([root / "a", root / "b"], output=tmp_path / "out")
    assert before == [folder_hash(root / name) for name in "ab"]
    one, other = result.models
    assert [one.name, other.name] == ["a", "b"]
    maps = [TokenMap.read(folder) for folder in (one, other, root / "a", root / "b")]
    assert maps[0].hash == maps[1].hash
    assert all(maps[0].texts[i] == text for i, text in maps[2].texts.items())
    assert maps[0].ids.keys() == maps[2].ids.keys() | maps[3].ids.keys()
    assert result.rows % 64 == 0
    for name in "ab":
        still_is(root / name, tmp_path / "out" / name)
        assert check(tmp_path / "out" / name).ok
    first, second = (tensors(folder)[TABLES[0]] for folder in (one, other))
    only_b = [maps[0].ids[text] for text in maps[3].ids.keys() - maps[2].ids.keys()]
    only_a = [maps[0].ids[text] for text in maps[2].ids.keys() - maps[3].ids.keys()]
    for missing in (only_a, only_b):  # with two models the mean is the other's row
        assert torch.equal(first[missing], second[missing])
    padding = first[result.tokens :]
    assert torch.allclose(padding, first[: maps[2].tokens].mean(0).expand_as(padding), atol=1e-5)
    tokenizer = load_tokenizer(one)
    assert all(tokenizer.pieces(maps[0].texts[i]) == [i] for i in only_b)
    record = Manifest.read(other).last("align")
    assert (record.place, [model.name for model in record.models]) == (1, ["a", "b"])
    assert record.rows == result.rows


def test_other_ids_are_moved_and_configs_with_them(siblings, tmp_path):
    root = siblings
    other = shutil.copytree(root / "other", tmp_path / "other")
    for name in ("config.json", "generation_config.json"):
        content = json.loads((other / name).read_text())
        (other / name).write_text(json.dumps({**content, "eos_token_id": [0, 300]}))
    end = TokenMap.read(other).texts[300]
    result = align([root / "base", other], output=tmp_path / "out")
    assert result.added == (0, 0)
    assert folder_weights(tmp_path / "out" / "base") == folder_weights(root / "base")
    still_is(other, tmp_path / "out" / "other")
    moved = TokenMap.read(tmp_path / "out" / "other").ids[end]
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "out" / "other" / name).read_text())
        assert content["eos_token_id"] == [0, moved] != [0, 300]


def folder_weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.matrix), "bfloat16"])
def test_a_tied_model_beside_an_untied_one_is_untied_and_rows_are_as_many(tmp_path, dtype):
    tied = adapter_parts.write_base(tmp_path / "tied", tied=True, rows=448, dtype=dtype)
    adapter_parts.write_base(tmp_path / "untied", tied=False, dtype=dtype)
    result = align([tied, tmp_path / "untied"], output=tmp_path / "out")
    assert (result.rows, result.tied) == (448, False)
    for name in ("tied", "untied"):
        still_is(tmp_path / name, tmp_path / "out" / name)
        config = json.loads((tmp_path / "out" / name / "config.json").read_text())
        assert (config["vocab_size"], config["tie_word_embeddings"]) == (448, False)
        assert check(tmp_path / "out" / name).ok


@pytest.mark.matrix
def test_a_blend_of_aligned_models_is_the_blend_of_the_models(siblings, tmp_path):
    root = siblings
    align([root / "a", root / "b"], output=tmp_path / "out")
    for name, folder in (("plain", root), ("aligned", tmp_path / "out")):
        models = [folder / "a", folder / "b"]
        blend(models, base=folder / "a", method="linear", output=tmp_path / name)
    one, other = tensors(tmp_path / "plain"), tensors(tmp_path / "aligned")
    tokens = TokenMap.read(tmp_path / "plain").tokens
    for name, tensor in one.items():
        count = tokens if name in TABLES else len(tensor)
        assert torch.allclose(tensor[:count], other[name][:count], atol=1e-7), name


def test_room_for_what_lies_beside_the_weights_is_foreseen(siblings, tmp_path):
    other = Path(shutil.copytree(siblings / "other", tmp_path / "other"))
    parts.fill_beside(other)
    with pytest.raises(LexigraftError, match="GB free"):
        align([siblings / "base", other], output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_an_alignment_keeps_the_rules_of_outputs(siblings, tmp_path):
    root = siblings
    models = [root / "base", root / "other"]
    plan = align(models, output=tmp_path / "out", dry_run=True).plan
    assert not (tmp_path / "out").exists()
    assert plan.keys() == {"base", "other"}
    align(models, output=tmp_path / "out")
    kept = folder_hash(tmp_path / "out")
    with pytest.raises(LexigraftError, match="exists"):
        align(models, output=tmp_path / "out")
    align(models, output=tmp_path / "out", force=True)
    assert folder_hash(tmp_path / "out") == kept
    for given in ([root / "a"], [root / "a", root / "a"]):
        with pytest.raises(LexigraftError, match="are called"):
            align(given, output=tmp_path / "no")
    deep = parts.write_byte_level(tmp_path / "deep", vocab_size=TOKENS)
    parts.write_model(deep, tokens=TOKENS, layers=3, tied=True)
    with pytest.raises(RefusalError, match=r"deep has model\.layers"):
        align([root / "a", deep], output=tmp_path / "no")
    assert not (tmp_path / "no").exists()
