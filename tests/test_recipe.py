"""The keys of a recipe's `learn` part: what they name, and when a change of them learns again."""

import json
from pathlib import Path

import pytest

import parts
from lexigraft import LexigraftError, families, learn
from lexigraft.pipeline import _grow
from lexigraft.recipe import Recipe
from lexigraft.stages import opened

ROOT = Path(__file__).parents[1]
TEXT = """
base: base
corpus: c.txt
general: [g.txt]
learn:
  tokens: 38
  min_count: 5
  contrast: animals.txt#weight=2
  terms: ["terms.csv#column=name", more.txt]
  pin: pins.txt
  ban: bans.txt
  special: special.txt
  change_check_text: true
  workers: 1
graft: {pad_to: 8}
"""
ANIMALS = "quokka wombat platypus axolotl pangolin\n\n" * 200


@pytest.fixture
def project(tmp_path):
    base = parts.write_byte_level(tmp_path / "base")
    parts.write_model(base, tokens=382, tied=True)
    files = {
        "c.txt": parts.corpus_text(documents=60) + "\nzugzwang, zeitgeist\n",
        "animals.txt": ANIMALS,
        "g.txt": parts.plain_english()[:20_000],
        "terms.csv": "code,name\n1,nephritis\n2,性\n",
        "more.txt": "hepatoma\n",
        "pins.txt": "zu\n",
        "bans.txt": "nephritis\n",
        "special.txt": "<|diagnosis|>\n",
        "recipe.yaml": TEXT,
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def grown(project):
    """Stages that were skipped when learn and graft run as the recipe says."""
    recipe = Recipe.read(project / "recipe.yaml")
    with opened(recipe, project / "run", force=False) as current:
        _grow(current, recipe, project / "base")
        return current.skipped


def new_words(project):
    lines = (project / "run" / "vocab" / "new_tokens.jsonl").read_text().splitlines()
    return {row["text"].strip(): row["origin"] for row in map(json.loads, lines) if row["text"]}


def test_paths_are_relative_to_the_recipe_and_fragments_stay(project):
    part = Recipe.read(project / "recipe.yaml").learn
    assert part.contrast == [f"{project}/animals.txt#weight=2"]
    assert part.terms == [f"{project}/terms.csv#column=name", f"{project}/more.txt"]
    assert (part.pin, part.ban, part.special) == tuple(
        [f"{project}/{name}.txt"] for name in ("pins", "bans", "special")
    )
    data = "hf:owner/name#column=text"
    assert Recipe.parse(
        {"base": "b", "corpus": data, "learn": {"contrast": data}}, where="here"
    ).beside(project).learn.contrast == [data]


def test_every_file_of_the_learn_part_is_obeyed_and_grafted(project):
    grown(project)
    words = new_words(project)
    assert words["性"] == words["zu"] == "term" and "nephritis" not in words
    extended = families.load(project / "run" / "model")
    assert extended.map.texts[extended.map.tokens - 1] == "<|diagnosis|>"
    result = json.loads((project / "run" / "run.json").read_text())["stages"]["learn"]["result"]
    assert result["terms"]["listed"] == 4
    row = json.loads((project / "run" / "vocab" / "new_tokens.jsonl").read_text().splitlines()[0])
    spec = (ROOT / "docs" / "files.md").read_text()
    for key in {*row, *result, *result["size"], *result["terms"]} - {"output"}:
        assert f"`{key}`" in spec, key


def test_a_run_learns_what_the_verb_learns(project):
    grown(project)
    at = project.joinpath
    learn(
        at("base"), corpus=[at("c.txt")], general=[at("g.txt")],
        contrast=[f"{at('animals.txt')}#weight=2"], terms=[f"{at('terms.csv')}#column=name", at("more.txt")],
        pin=[at("pins.txt")], ban=[at("bans.txt")], special=[at("special.txt")], tokens=38,
        min_count=5, change_check_text=True, output=at("vocab"),
    )  # fmt: skip
    for path in sorted(at("vocab").iterdir()):
        assert path.read_bytes() == (at("run") / "vocab" / path.name).read_bytes(), path.name


def test_a_changed_file_is_learned_from_again(project):
    assert grown(project) == []
    assert grown(project) == ["learn", "graft"]
    changes = {
        "terms.csv": "code,name\n1,arthritis\n",
        "more.txt": "dermatosis\n",
        "pins.txt": "ze\n",
        "bans.txt": "hepatoma\n",
        "special.txt": "<|other|>\n",
        "animals.txt": ANIMALS.replace("wombat", "gastrectomy"),
    }
    for name, text in changes.items():
        (project / name).write_text(text)
        assert "learn" not in grown(project), name


@pytest.mark.matrix
def test_only_what_decides_the_result_makes_it_learn_again(project):
    grown(project)
    changes = [
        ("workers: 1", "workers: 2", False),
        ("workers: 1", "engine: local", False),
        ("terms.csv#column=name", "terms.csv#column=code", True),
        ("change_check_text: true", "change_check_text: false", True),
        ("animals.txt#weight=2", "animals.txt", True),
        ("  pin: pins.txt\n", "", True),
    ]
    text = TEXT
    for old, new, again in changes:
        assert old in TEXT
        text = TEXT.replace(old, new) if not again else text.replace(old, new)
        (project / "recipe.yaml").write_text(text)
        assert ("learn" not in grown(project)) is again, new


@pytest.mark.parametrize("key", ["terms", "contrast"])
def test_a_missing_file_is_named(project, key):
    (project / "recipe.yaml").write_text(
        f"base: base\ncorpus: c.txt\nlearn: {{{key}: none.txt, min_count: 5}}\n"
    )
    with pytest.raises(LexigraftError, match=r"none\.txt"):
        grown(project)


@pytest.mark.parametrize(
    ("learn_part", "words"),
    [
        ("{term: t.txt}", ["learn.term", "terms"]),
        ("{engine: spark}", ["learn.engine", "local"]),
        ("{workers: 0}", ["learn.workers"]),
    ],
)
def test_a_wrong_key_or_value_is_one_message(project, learn_part, words):
    (project / "recipe.yaml").write_text(f"base: base\ncorpus: c.txt\nlearn: {learn_part}\n")
    with pytest.raises(LexigraftError) as caught:
        Recipe.read(project / "recipe.yaml")
    assert all(word in str(caught.value) for word in words)


def test_a_stage_has_a_share_or_a_limit():
    """Both would leave open which of them ends it."""
    stage = {"mode": "rows", "share": 0.2}
    recipe = {"base": "b", "corpus": "c.txt", "train": {"stages": [stage]}}
    assert Recipe.parse(recipe, where="here").stages[0].share == 0.2
    stage["max_bytes"] = 1000
    with pytest.raises(LexigraftError, match="either share or one of max_bytes"):
        Recipe.parse(recipe, where="here")


def test_files_of_a_graft_lie_beside_the_recipe(tmp_path):
    (tmp_path / "big").mkdir()
    data = {"base": "owner/base", "corpus": "c.txt"}
    graft = {"init": "mean,copy", "init_from": "list.tsv", "donor": "big"}
    part = Recipe.parse({**data, "graft": graft}, where="r").beside(tmp_path).graft
    assert (part.init_from, part.donor) == (str(tmp_path / "list.tsv"), str(tmp_path / "big"))
    assert part.choices == {"init": "mean,copy", "pad_to": 64}
    hub = Recipe.parse({**data, "graft": {"donor": "owner/other"}}, where="r").beside(tmp_path)
    assert (hub.graft.donor, hub.graft.init_from) == ("owner/other", None)
