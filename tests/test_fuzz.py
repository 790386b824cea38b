"""Mutants of real folders, for a short while; `make fuzz` runs thousands.

What a mutant found is a test of its own below.
"""

from __future__ import annotations

import json
import random

import pytest
import yaml

import fuzz
import parts
from lexigraft.errors import LexigraftError
from lexigraft.families.tokenmap import parse_sentencepiece
from lexigraft.steps.check import check
from lexigraft.steps.merge import merge
from test_check_gallery import Ground

SECONDS = 15


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return fuzz.write_sources(tmp_path_factory.mktemp("fuzz") / "sources")


@pytest.fixture
def ground(sources, tmp_path):
    return Ground(sources, tmp_path)


def test_mutants_end_in_a_result_or_one_clear_message(sources):
    tally = fuzz.fuzz(sources, first=0, mutants=10_000, jobs=1, seconds=SECONDS, least=40)
    assert not tally.faults, tally.faults[0]
    assert tally.mutants >= 40


def test_a_seed_gives_the_same_mutant(sources, tmp_path):
    made = []
    for name in ("one", "two"):
        place = tmp_path / name
        (place / "in").mkdir(parents=True)
        draw = random.Random(11)
        _, _, folders = fuzz.actions(sources, place, draw)
        paths = sorted(p for folder in folders for p in folder.iterdir())
        for path in draw.sample(paths, 3):
            fuzz.mutate(path, draw)
        made.append({str(p.relative_to(place)): p.read_bytes() for p in paths})
    assert made[0] == made[1]


# -- what earlier mutants found


@pytest.mark.parametrize("text", ["", "▁" * 400, "x", "<0xZZ>"])
def test_a_byte_piece_that_names_no_byte(ground, text):
    path = ground.sp / "tokenizer.model"
    proto = parse_sentencepiece(path.read_bytes(), path)
    next(piece for piece in proto.pieces if piece.type == 6).piece = text
    path.write_bytes(proto.SerializeToString())
    assert check(ground.sp, consumer="gguf").findings


@pytest.mark.parametrize("content", ["[]", '"x"', "7", '["ab", "cd"]'])
def test_a_generation_config_that_is_no_object(ground, tmp_path, content):
    (ground.sp / "generation_config.json").write_text(content)
    with pytest.raises(LexigraftError, match="JSON object"):
        merge(ground.sp, [ground.adapter], output=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer_config.json", "added_tokens.json"])
def test_a_tokenizer_file_that_is_no_object(tmp_path, name):
    from lexigraft import families

    folder = parts.write_byte_level_files(tmp_path / "base")
    (folder / name).write_text("[1]")
    with pytest.raises(LexigraftError):
        families.load(folder).encode("text")


@pytest.mark.parametrize("name", ["9" * 400, "a\0b"])
def test_names_that_no_file_can_have(tmp_path, name):
    """A recipe, a corpus, a model: one message, not an OSError of the system."""
    from lexigraft import graft, learn
    from lexigraft.recipe import Recipe

    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"base": name, "corpus": name}))
    assert Recipe.read(recipe).base == name
    for call in (
        lambda: check(name),
        lambda: graft(name, tmp_path, output=tmp_path / "grafted"),
        lambda: learn(name, corpus=[name], output=tmp_path / "out"),
        lambda: learn(parts.write_byte_level(tmp_path / "b"), corpus=[name], output=tmp_path / "o"),
    ):
        with pytest.raises(LexigraftError):
            call()


def test_a_character_that_is_a_token_of_another_kind_already(sources, tmp_path):
    """A user-defined piece that is one letter: the letter is no pending one, and is left alone."""
    from lexigraft import learn

    ground = Ground(sources, tmp_path / "ground")
    folder = ground.copy("learned")
    path = folder / "tokenizer.model"
    proto = parse_sentencepiece(path.read_bytes(), path)
    for piece in proto.pieces[300:]:
        piece.type = 4
    path.write_bytes(proto.SerializeToString())
    for name in ("tokenizer.json", "lexigraft.json"):
        (folder / name).unlink(missing_ok=True)
    try:
        learn(
            folder, corpus=[sources / "corpus.txt"], tokens="6", min_count=2, output=tmp_path / "o"
        )
    except LexigraftError as fault:
        assert fault.fix


def test_a_blend_recipe_whose_parts_are_of_other_kinds(tmp_path):
    """Numbers for lists, lists for names; a number of 400 digits."""
    from lexigraft.blending.settings import from_recipe

    whole, recipe = yaml.safe_load(fuzz.BLEND.format("/x")), tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(whole))
    assert from_recipe(recipe, seed=0).models == ("/x/model",)  # the base changes nothing
    density = [{"filter": 7, "value": 0.5}]
    for wrong in (
        {"models": 7},
        {"slices": True},
        {"slices": {"0": 1}, "models": None},
        {"slices": [{"sources": 1.5}]},
        {"dtype": ["float32"]},
        {"parameters": {"density": density}},
        {"parameters": {"lambda": 10**400}},
    ):
        recipe.write_text(yaml.safe_dump({**whole, **wrong}))
        with pytest.raises(LexigraftError) as fault:
            from_recipe(recipe, seed=0)
        assert str(recipe) in fault.value.found


@pytest.mark.parametrize("metadata", [[""], "x", 7])
def test_an_index_whose_metadata_is_no_object(ground, tmp_path, metadata):
    """It is written anew: the total size is counted, not believed."""
    from lexigraft import graft

    path = ground.shards / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "metadata": metadata}))
    graft(ground.shards, ground.copy("model"), output=tmp_path / "out", pad_to=8)
    written = json.loads((tmp_path / "out" / path.name).read_text())
    assert written["metadata"]["total_size"] > 0


def test_half_a_character_in_a_header_is_refused_as_the_reference_reader_refuses_it(tmp_path):
    """Found by a merge: such a name could be read, and then not be written."""
    from safetensors import SafetensorError, safe_open

    from lexigraft.checkpoints.header import read_header

    path = tmp_path / "model.safetensors"
    for escaped, fits in (("\\ud83d\\ude00", True), ("\\ud800", False)):
        text = f'{{"{escaped}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}'.encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + b"x")
        if fits:
            assert read_header(path).tensors[0].name == "\U0001f600"
            assert safe_open(path, "np").keys() == ["\U0001f600"]
        else:
            with pytest.raises(LexigraftError, match="not JSON"):
                read_header(path)
            with pytest.raises(SafetensorError):
                safe_open(path, "np")
