"""`learn --replace`: new words under the ids and rows of old tokens, from the choice to the merge."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import launching
import parts
from lexigraft import (
    LexigraftError,
    align,
    blend,
    check,
    evaluate,
    extract,
    families,
    graft,
    graft_distilled,
    learn,
    merge,
    prune,
    split,
    train,
    unprune,
)
from lexigraft.checkpoints.checkpoint import Checkpoint
from lexigraft.checkpoints.survey import never_trained
from lexigraft.errors import RefusalError
from lexigraft.families.proof import HARD_TEXTS, prove
from lexigraft.families.replacing import fill, vacate
from lexigraft.files import read_json
from lexigraft.manifest import Manifest
from lexigraft.selection import pruning
from lexigraft.selection.replacing import choose_leaving

KINDS = {
    "byte": parts.write_byte_level,
    "byte-ignore": lambda folder: parts.write_byte_level(folder, ignore_merges=True),
    "gpt2-files": parts.write_byte_level_files,
    "sp-both": parts.write_sentencepiece,
    "unigram": parts.write_unigram,
    "unigram-model": lambda folder: parts.write_unigram(folder, files="model"),
    "wordpiece": parts.write_wordpiece,
    "wordpiece-lines": lambda folder: parts.write_wordpiece(folder, fast=False),
}
EMBED = "model.embed_tokens.weight"
COUNT = 20


def english() -> list[str]:
    return parts.ENGLISH.read_text("utf-8").splitlines()


def gone(family, count=COUNT, **options):
    given = {"untrained": (), "kept": (), "texts": english(), "by_use": True}
    return choose_leaving(family, count, **{**given, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_given_away_and_other_texts_stay(kind, tmp_path):
    """Laws 1 (with its exception), 2, 3 and 5, more words than ids included."""
    base = families.load(KINDS[kind](tmp_path / "base"))
    ids = sorted(gone(base))
    (tmp_path / "left").mkdir()
    left = vacate(base, ids, tmp_path / "left")
    assert left.map.texts == {i: t for i, t in base.map.texts.items() if i not in ids}
    texts = [*english(), *HARD_TEXTS, parts.corpus_text(3, 3)]
    found = pruning.prove(base, left, {i: i for i in left.map.texts}, texts)
    assert found.texts >= len(texts) and found.changed < found.texts
    corpus = parts.corpus_text(1, 30).split("\n\n")
    merges = parts.lengthen(tmp_path / "left", tmp_path / "new", corpus, tokens=COUNT + 5)
    fill(left, tmp_path / "new")
    extended = families.load(tmp_path / "new", own=True)
    assert extended.map.tokens == base.map.tokens + 5
    assert {i for i, t in base.map.texts.items() if extended.map.texts[i] != t} == set(ids)
    new = [*ids, *range(base.map.tokens, extended.map.tokens)]
    assert [extended.map.texts[i] for i in new] == [merge.token for merge in merges]
    emitted = {i for line in extended.encode_batch(corpus) for i in line}
    assert emitted & set(ids)
    if base.guaranteed:  # elsewhere `learn` drops what breaks law 2
        assert prove(left, extended, [*english()[:40], corpus[0]]).emitted.keys() <= set(new)


def test_what_goes_first_and_what_never_goes(tmp_path):
    base = families.load(parts.write_byte_level(tmp_path / "base"))
    used = {i for ids in base.encode_batch(english()) for i in ids}
    idle = sorted(set(base.map.texts) - used - base.fixed)
    leaf = min(set(idle) - {part for of in base.needs().values() for part in of})
    first = gone(base, 60, untrained=[leaf, max(used - base.fixed)])
    order = ("untrained", "rare")  # of what no text becomes, see the next test
    assert list(first.values()) == sorted(first.values(), key=order.index)
    assert [i for i, why in first.items() if why == "untrained"] == [leaf]
    rare = [i for i, why in first.items() if why == "rare"]
    assert set(rare[:5]) <= set(idle) and not set(rare) <= set(idle)
    assert not first.keys() & base.fixed and base.map.tokens - 1 not in first
    needs = base.needs()
    for place in range(len(first)):  # every beginning of the list can go without the rest
        out = set(list(first)[: place + 1])
        assert not any(out & set(needs.get(i, ())) for i in base.map.texts if i not in out)
    assert rare[0] not in gone(base, 5, kept=rare[:1])
    with pytest.raises(LexigraftError, match="--general"):
        gone(base, 60, by_use=False)


@pytest.mark.parametrize(
    "kind",
    ["wordpiece", *(pytest.param(k, marks=pytest.mark.matrix) for k in ("byte", "sp", "unigram"))],
)
def test_a_row_that_no_text_reaches_is_the_first_to_be_given_away(kind, tmp_path):
    base, idle = parts.write_idle(tmp_path / "base", kind)
    family = families.load(base)
    first = gone(family, 3, untrained=[])
    assert next(iter(first.items())) == (idle, "unreachable")
    assert list(first.values()) == ["unreachable", "rare", "rare"]
    (tmp_path / "corpus.txt").write_text(parts.corpus_text(documents=6), "utf-8")
    result = learn(
        base, corpus=[tmp_path / "corpus.txt"], replace=1, min_count=2, allow_more=True,
        output=tmp_path / "v",
    )  # fmt: skip
    assert (result.replaced.unreachable, result.replaced.count) == (1, 1)
    assert "1 that no text has, 0 never trained, 0 least used" in "\n".join(result.lines())
    new = families.load(tmp_path / "v").map
    assert new.texts.keys() == family.map.texts.keys()
    assert [i for i, text in family.map.texts.items() if new.texts[i] != text] == [idle]
    assert [one.id for one in Manifest.read(tmp_path / "v").last("learn").replaced] == [idle]


@pytest.mark.parametrize("kind", ["ranks", "lone model"])
def test_ids_that_are_ranks_are_refused(kind, tmp_path):
    folder = tmp_path / "base"
    if kind == "ranks":
        parts.write_ranks(folder)
    else:
        parts.write_sentencepiece(folder, fast=False)
    (tmp_path / "c.txt").write_text(parts.corpus_text(documents=5), "utf-8")
    with pytest.raises(RefusalError, match="--replace"):
        learn(folder, corpus=[tmp_path / "c.txt"], replace=5, output=tmp_path / "v")
    assert not (tmp_path / "v").exists()


@pytest.fixture(scope="module", name="place")
def make_place(tmp_path_factory):
    """A tied base whose last rows were never trained, and everything that is made of it."""
    folder = tmp_path_factory.mktemp("replace")
    (folder / "corpus.txt").write_text(parts.corpus_text(documents=60), "utf-8")
    (folder / "general.txt").write_text("\n\n".join(english()), "utf-8")
    base = parts.write_byte_level(folder / "base")
    family = families.load(base)
    parts.write_model(
        base, tokens=family.map.tokens, rows=family.map.tokens + 6, tied=True, eos=380
    )
    weights = load_file(base / "model.safetensors")
    used = {i for ids in family.encode_batch(english()) for i in ids}
    leaves = (
        set(family.map.texts) - family.fixed - {i for of in family.needs().values() for i in of}
    )
    untrained = {"idle": max(leaves - used), "used": max(leaves & used)}
    for token_id in untrained.values():
        weights[EMBED][token_id] *= 0
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    learn(
        base, corpus=[folder / "corpus.txt"], general=[folder / "general.txt"], replace=COUNT,
        allow_more=True, min_count=5, output=folder / "vocab",
    )  # fmt: skip
    graft(base, folder / "vocab", init="mean", output=folder / "model")
    train(
        folder / "model", corpus=[folder / "corpus.txt"], mode="lora", lora_rank=4,
        output=folder / "adapter", block_size=64, max_bytes=4000, measurements=1,
        measured_bytes=1000,
    )  # fmt: skip
    return folder, untrained


def replaced(folder) -> dict[int, tuple[str, str]]:
    record = Manifest.read(folder).last("learn")
    return {one.id: (one.old, one.new) for one in record.replaced}


def test_learn_moves_no_other_id_and_keeps_the_way_back(place):
    folder, untrained = place
    base, extended = (families.load(folder / name) for name in ("base", "vocab"))
    found = replaced(folder / "vocab")
    assert len(found) == COUNT and extended.map.tokens == base.map.tokens
    assert untrained["idle"] in found and untrained["used"] not in found
    assert {i: t for i, t in extended.map.texts.items() if i not in found}.items() <= (
        base.map.texts.items()
    )
    assert {**extended.map.texts, **{i: old for i, (old, _) in found.items()}} == base.map.texts
    assert all(extended.map.texts[i] == new for i, (_, new) in found.items())
    rows = [json.loads(line) for line in (folder / "vocab" / "new_tokens.jsonl").open()]
    assert [row["id"] for row in rows] == sorted(found)
    assert not {piece for row in rows for piece in row["pieces"]} & found.keys()
    assert check(folder / "vocab", base=folder / "base").ok


def test_graft_writes_these_rows_alone(place):
    """Laws 7, 8 and 11: all else is as it was, and nothing grows."""
    folder, _ = place
    before, after = (Checkpoint.open(folder / name) for name in ("base", "model"))
    assert before.config == after.config
    old, new = before.read(EMBED), after.read(EMBED)
    ids = sorted(replaced(folder / "vocab"))
    assert np.flatnonzero((old != new).any(axis=1)).tolist() == ids
    for line in (folder / "vocab" / "new_tokens.jsonl").open():
        row = json.loads(line)
        np.testing.assert_allclose(
            new[row["id"]], old[row["pieces"]].mean(axis=0), rtol=1e-5, atol=1e-7
        )
    for name in before.tensors.keys() - {EMBED}:
        assert before.read(name).tobytes() == after.read(name).tobytes()
    assert not any(f.severity == "error" for f in check(folder / "model", deep=True).findings)
    deep = check(folder / "model", base=folder / "base", deep=True)
    assert deep.ok and not {f.code for f in deep.findings} & {"LG601", "LG706"}


def test_only_these_rows_train_and_either_base_takes_them(place, tmp_path):
    """Laws 12, 14 and 16: the base's rows at these ids belong to other words."""
    folder, _ = place
    ids = sorted(replaced(folder / "vocab"))
    indices = read_json(folder / "adapter" / "adapter_config.json")["trainable_token_indices"]
    assert list(indices.values()) == [ids]
    report = read_json(folder / "adapter" / "training.json")
    assert [row["id"] for row in report["rows"]] == ids and report["base"]["domain_bpb"] is None
    for name in ("base", "model"):
        merge(folder / name, folder / "adapter", output=tmp_path / name, prove=True)
    one, other = (Checkpoint.open(tmp_path / name) for name in ("base", "model"))
    for name in one.tensors:
        assert one.read(name).tobytes() == other.read(name).tobytes()
    pristine = Checkpoint.open(folder / "base").read(EMBED)
    assert np.flatnonzero((one.read(EMBED) != pristine).any(axis=1)).tolist() == ids
    scored = evaluate(
        [tmp_path / "base"], corpus=[folder / "corpus.txt"], max_bytes=2000, speed_characters=0
    )
    assert scored.models[0].adoption > 0.05
    codes = {f.code for f in check(folder / "base", adapter=folder / "adapter").findings}
    assert "LG406" in codes and "LG404" not in codes
    assert not {"LG404", "LG406"} & {
        f.code for f in check(folder / "model", adapter=folder / "adapter").findings
    }


def without_rows(adapter, output):
    """The adapter as a trainer writes it that knows nothing of rows."""
    shutil.copytree(adapter, output)
    config = read_json(output / "adapter_config.json")
    config["trainable_token_indices"] = None
    (output / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(output / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "lora_" in name}
    assert len(kept) < len(weights)
    save_file(kept, output / "adapter_model.safetensors", {"format": "pt"})
    records = Manifest.read(output).records
    Manifest(records=[r for r in records if r.stage != "train"]).write(output)
    return output


def test_rows_that_no_adapter_holds_are_made_again(place, tmp_path):
    folder, _ = place
    adapter = without_rows(folder / "adapter", tmp_path / "adapter")
    merge(folder / "base", adapter, output=tmp_path / "merged")
    assert (
        Checkpoint.open(tmp_path / "merged").read(EMBED).tobytes()
        == Checkpoint.open(folder / "model").read(EMBED).tobytes()
    )


def test_an_old_adapter_stays_valid_unless_it_trained_these_rows(place, tmp_path):
    folder, _ = place
    old = without_rows(folder / "adapter", tmp_path / "old")
    families.copy_tokenizer(folder / "base", old)
    (old / "lexigraft.json").unlink()
    ids = sorted(replaced(folder / "vocab"))
    assert check(folder / "model", adapter=old).ok
    merge(folder / "model", old, output=tmp_path / "merged")
    assert families.load(tmp_path / "merged").map == families.load(folder / "model").map
    config = read_json(old / "adapter_config.json")
    weights = load_file(old / "adapter_model.safetensors")
    trained = load_file(folder / "adapter" / "adapter_model.safetensors")
    (key,) = trained.keys() - weights.keys()
    config["trainable_token_indices"] = {"model.embed_tokens": ids}
    (old / "adapter_config.json").write_text(json.dumps(config))
    save_file({**weights, key: trained[key]}, old / "adapter_model.safetensors", {"format": "pt"})
    assert "LG404" in {f.code for f in check(folder / "model", adapter=old).findings}
    with pytest.raises(LexigraftError, match="have other tokens in the base"):
        merge(folder / "model", old, output=tmp_path / "again")


def test_what_cannot_be_is_said(place, tmp_path):
    folder, _ = place
    given = {"corpus": [folder / "corpus.txt"], "output": tmp_path / "v", "allow_more": True}
    with pytest.raises(LexigraftError, match="tokens can go") as fault:
        learn(folder / "base", replace=300, **given)
    assert "--general" in str(fault.value)
    with pytest.raises(LexigraftError, match="--tokens 5 with --replace 9"):
        learn(folder / "base", tokens=5, replace=9, **given)
    with pytest.raises(LexigraftError, match="--from with --replace"):
        learn(folder / "base", from_vocab=folder / "vocab", replace=9, output=tmp_path / "v")
    with pytest.raises(LexigraftError, match="has the ids of old tokens"):
        learn(folder / "base", from_vocab=folder / "vocab", output=tmp_path / "v")
    shutil.copytree(folder / "base", tmp_path / "base")
    config = read_json(folder / "base" / "config.json")
    config["eos_token_id"] = min(replaced(folder / "vocab"))
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RefusalError, match="which the configs of"):
        graft(tmp_path / "base", folder / "vocab", output=tmp_path / "m")


def test_never_trained_rows_are_read_from_the_weights(place):
    folder, untrained = place
    assert never_trained(folder / "base", 382) == set(untrained.values())
    assert never_trained(folder / "vocab", 382) is None


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["gpt2-files", "sp-both", "unigram", "wordpiece"])
def test_learn_replaces_and_then_expands(kind, tmp_path):
    base = KINDS[kind](tmp_path / "base")
    (tmp_path / "corpus.txt").write_text(parts.corpus_text(documents=40), "utf-8")
    (tmp_path / "general.txt").write_text("\n\n".join(english()), "utf-8")
    result = learn(
        base, corpus=[tmp_path / "corpus.txt"], general=[tmp_path / "general.txt"], tokens=20,
        replace=12, min_count=5, allow_more=True, output=tmp_path / "v",
    )  # fmt: skip
    old, new = families.load(base).map, families.load(tmp_path / "v").map
    assert (result.added, result.replaced.count) == (20, 12) and new.tokens == old.tokens + 8
    assert sum(new.texts[i] != text for i, text in old.texts.items()) == 12


# With the other verbs


def test_split_puts_these_rows_into_the_base(place, tmp_path):
    """Laws 7, 14 and 16: from the pristine base and from the grafted one."""
    folder, _ = place
    merge(folder / "base", folder / "adapter", output=tmp_path / "merged")
    for name in ("base", "model"):
        pair = split(folder / name, folder / "adapter", output=tmp_path / name)
        merge(pair.base, pair.adapter, output=tmp_path / f"{name}-again")
        same_weights(tmp_path / f"{name}-again", tmp_path / "merged")
        changed = Checkpoint.open(pair.base).read(EMBED) != Checkpoint.open(folder / "base").read(
            EMBED
        )
        assert np.flatnonzero(changed.any(axis=1)).tolist() == sorted(replaced(folder / "vocab"))
        assert families.load(pair.base).map == families.load(folder / "vocab").map
        assert check(pair.base, adapter=pair.adapter).ok
        assert check(pair.base, base=folder / "base").ok


def same_weights(one, other):
    first, second = Checkpoint.open(one), Checkpoint.open(other)
    assert first.tensors.keys() == second.tensors.keys()
    for name in first.tensors:
        assert first.read(name).tobytes() == second.read(name).tobytes(), name


def test_extract_finds_these_rows_by_the_manifest(place, tmp_path):
    folder, _ = place
    base, tuned = folder / "base", tmp_path / "tuned"
    merge(base, folder / "adapter", output=tuned)
    found = extract(tuned, base=base, rank=8, output=tmp_path / "found")
    ids = sorted(replaced(folder / "vocab"))
    assert found.added == COUNT and [list(one.ids) for one in found.of("rows")] == [ids]
    merge(base, found.output, output=tmp_path / "again")
    one, other = (Checkpoint.open(tmp_path / name) for name in ("again", "tuned"))
    assert one.read(EMBED).tobytes() == other.read(EMBED).tobytes()
    for name in one.tensors:
        np.testing.assert_allclose(one.read(name), other.read(name), atol=1e-5, err_msg=name)
    assert families.load(tmp_path / "again").map == families.load(tuned).map
    assert check(tmp_path / "again", base=base).ok
    (tuned / "lexigraft.json").unlink()
    with pytest.raises(LexigraftError, match=f"id {ids[0]} is") as fault:
        extract(tuned, base=base, output=tmp_path / "no")
    assert "lexigraft.json" in fault.value.fix


@pytest.mark.matrix
def test_align_and_blend_go_by_the_texts_of_these_ids(place, tmp_path):
    folder, _ = place
    models = [folder / "base", folder / "model"]
    result = align(models, output=tmp_path / "out")
    old, new = (families.load(one).map for one in models)
    both = families.load(result.models[0]).map
    assert both == families.load(result.models[1]).map and both.ids.keys() == {*old.ids, *new.ids}
    assert result.added == (COUNT, COUNT)
    for model, own, out in zip(models, (old, new), result.models, strict=True):
        before, after = Checkpoint.open(model).read(EMBED), Checkpoint.open(out).read(EMBED)
        ids = list(own.texts)
        assert np.array_equal(after[[both.ids[own.texts[i]] for i in ids]], before[ids])
        assert not {f.code for f in check(out).findings if f.severity != "note"}
    blend(models, base=models[0], method="linear", output=tmp_path / "blended")
    texts = families.load(tmp_path / "blended").map
    assert {*new.ids} <= texts.ids.keys()
    assert not {f.code for f in check(tmp_path / "blended").findings if f.severity != "note"}


def test_weighted_adapters_want_the_model_in_which_ids_were_given_away(place, tmp_path):
    folder, _ = place
    second = shutil.copytree(folder / "adapter", tmp_path / "second")
    both, halves = [folder / "adapter", second], [0.5, 0.5]
    with pytest.raises(RefusalError, match="gave 20 ids of") as fault:
        merge(folder / "base", both, weights=halves, output=tmp_path / "no")
    assert "--remap" in fault.value.fix and not (tmp_path / "no").exists()
    merge(folder / "model", both, weights=halves, output=tmp_path / "halves")
    merge(folder / "model", folder / "adapter", output=tmp_path / "whole")
    one, other = (Checkpoint.open(tmp_path / name) for name in ("halves", "whole"))
    for name in one.tensors:
        np.testing.assert_allclose(one.read(name), other.read(name), atol=1e-6, err_msg=name)
    assert families.load(tmp_path / "halves").map == families.load(folder / "model").map
    moved = merge(folder / "base", both, weights=halves, remap=True, output=tmp_path / "moved")
    assert moved.tokens == families.load(folder / "base").map.tokens + COUNT
    texts, rows = families.load(tmp_path / "moved").map, Checkpoint.open(tmp_path / "moved")
    ids = replaced(folder / "vocab")
    places = [texts.ids[new] for _, new in ids.values()]
    np.testing.assert_allclose(rows.read(EMBED)[places], other.read(EMBED)[list(ids)], atol=1e-6)


@pytest.mark.matrix
def test_rows_of_given_ids_are_distilled(place, tmp_path):
    """`graft --init distill`: these rows learn from the reading in old tokens, and no other moves."""
    folder, _ = place
    graft_distilled(
        folder / "base", folder / "vocab", corpus=[folder / "corpus.txt"], max_bytes=3000,
        init="mean", output=tmp_path / "out",
    )  # fmt: skip
    ids = sorted(replaced(folder / "vocab"))
    old, start, end = (
        Checkpoint.open(one).read(EMBED)
        for one in (folder / "base", folder / "model", tmp_path / "out")
    )
    assert np.flatnonzero((old != end).any(axis=1)).tolist() == ids
    assert (start != end).any(axis=1).sum() > COUNT / 2
    assert check(tmp_path / "out", base=folder / "base", deep=True).ok


@pytest.mark.matrix
def test_prune_takes_a_model_whose_ids_were_given_away(place, tmp_path):
    folder, _ = place
    small = prune(
        folder / "model", corpus=[folder / "corpus.txt"], adapters=[folder / "adapter"],
        output=tmp_path / "small",
    )  # fmt: skip
    texts = families.load(small.output).map
    assert {new for _, new in replaced(folder / "vocab").values()} <= texts.ids.keys()
    merge(small.output, small.output / "adapters" / "adapter", output=tmp_path / "merged")
    merge(folder / "model", folder / "adapter", output=tmp_path / "whole")
    places = Manifest.read(small.output).last("prune").places
    before, after = (Checkpoint.open(tmp_path / n).read(EMBED) for n in ("whole", "merged"))
    assert np.array_equal(after[: len(places)], before[list(places)])
    unprune(small.output, output=tmp_path / "back")
    same_weights(tmp_path / "back", folder / "model")
    assert replaced(tmp_path / "back") == replaced(folder / "vocab")
    again = learn(
        small.output, corpus=[folder / "corpus.txt"], general=[folder / "general.txt"], replace=5,
        allow_more=True, min_count=5, output=tmp_path / "vocab",
    )  # fmt: skip
    assert again.replaced.count == 5
    graft(small.output, tmp_path / "vocab", output=tmp_path / "model")
    assert check(tmp_path / "model", base=small.output).ok


@pytest.mark.matrix
def test_a_head_of_its_own_gets_these_rows_too(tmp_path):
    """Laws 10, 12 and 14 of an untied model."""
    base = parts.write_byte_level(tmp_path / "base")
    parts.write_model(base, tokens=families.load(base).map.tokens, tied=False, eos=380)
    corpus, general = tmp_path / "corpus.txt", tmp_path / "general.txt"
    corpus.write_text(parts.corpus_text(documents=40), "utf-8")
    general.write_text("\n\n".join(english()), "utf-8")
    learn(
        base, corpus=[corpus], general=[general], replace=COUNT, allow_more=True, min_count=5,
        output=tmp_path / "vocab",
    )  # fmt: skip
    graft(base, tmp_path / "vocab", init="mean", output=tmp_path / "model")
    train(
        tmp_path / "model", corpus=[corpus], mode="lora", lora_rank=4, output=tmp_path / "adapter",
        block_size=64, max_bytes=4000, measurements=1, measured_bytes=1000,
    )  # fmt: skip
    merge(base, tmp_path / "adapter", output=tmp_path / "merged", prove=True)
    one, other = Checkpoint.open(base), Checkpoint.open(tmp_path / "merged")
    for name in (EMBED, "lm_head.weight"):
        moved = np.flatnonzero((one.read(name) != other.read(name)).any(axis=1))
        assert moved.tolist() == sorted(replaced(tmp_path / "vocab"))


@pytest.mark.matrix
def test_two_processes_train_these_rows_as_one_does(place, tmp_path):
    """Laws 12 and 13: copied, as `accelerate launch` starts them, and sharded."""
    folder, _ = place
    options = ["--max-steps", "4", "--block-size", "32", "--json"]
    done = launching.launched(
        "train", folder / "model", "--corpus", folder / "corpus.txt", "-o", tmp_path / "two",
        *options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    train(
        folder / "model", corpus=[folder / "corpus.txt"], output=tmp_path / "one", max_steps=4,
        block_size=32, batch_size=2,
    )  # fmt: skip
    logs = [read_json(tmp_path / name / "training.json")["log"] for name in ("one", "two")]
    for entry, twin in zip(*logs, strict=True):
        assert entry["train_bpb"] == (twin["train_bpb"] and pytest.approx(twin["train_bpb"], 1e-4))
    pristine, ids = Checkpoint.open(folder / "base").read(EMBED), sorted(replaced(folder / "vocab"))
    merge(folder / "base", tmp_path / "two", output=tmp_path / "merged")
    changed = Checkpoint.open(tmp_path / "merged").read(EMBED) != pristine
    assert np.flatnonzero(changed.any(axis=1)).tolist() == ids
    script = Path(__file__).with_name("two_processes.py")
    cases = [(str(folder / "model"), str(tmp_path / f"sharded-{m}"), m) for m in ("rows", "lora")]
    (folder / "sharded.json").write_text(json.dumps(cases))
    launching.torchrun(script, "sharded", folder)
    for _, output, _ in cases:
        shared, alone = (
            load_file(at / "adapter_model.safetensors")
            for at in (Path(output), Path(output) / "alone")
        )
        assert {name: t.shape for name, t in shared.items()} == {
            name: t.shape for name, t in alone.items()
        }
