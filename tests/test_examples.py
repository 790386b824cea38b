"""The recipes of examples/ run, with texts under the names that they name and a tiny base."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

import adapter_parts
import parts
from lexigraft import check, run

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"), key=lambda p: p.name)
TERMS = ["冠状动脉", "肺炎", *(f"{a}{b}" for a in adapter_parts.HAN for b in "炎症")]
TABLES = {
    "glossary.csv": "term,definition\n"
    + "".join(
        f"{term},the {n} of the heart {term} in plain words {term}\n"
        for n, term in enumerate(TERMS)
    ),
    "icd10.csv": "code,name\n1,冠状动脉\n2,肺炎\n",
}


def local(spec, folder):
    """Write what a text spec or a list names; a data set of the hub becomes a file."""
    if spec.startswith("hf:"):
        return local("texts/hub.txt", folder)
    name, mark, options = spec.partition("#")
    place = folder / name.replace("*", "one")
    if not place.suffix:
        place = place / "one.txt"
    place.parent.mkdir(parents=True, exist_ok=True)
    content = parts.corpus_text(len(name), documents=120, sentences=3)
    if name.startswith("terms/"):
        content = TABLES.get(place.name, "<|mark|>\n" if "marks" in name else "the\n")
    elif place.suffix == ".jsonl":
        content = "".join(f"{json.dumps({'text': d})}\n" for d in content.split("\n\n"))
    place.write_text(content, "utf-8")
    return name + mark + options


def small(value, folder):
    """A part of a recipe with its files in place and its sizes cut down."""
    if isinstance(value, dict):
        return {key: small(part, folder) for key, part in value.items()}
    if isinstance(value, list):
        return [small(part, folder) for part in value]
    if isinstance(value, str) and re.match(r"(texts|terms)/|hf:", value):
        return local(value, folder)
    return value


@pytest.mark.matrix
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path, tmp_path):
    base = parts.write_byte_level(tmp_path / "base", vocab_size=500)
    parts.write_model(base, tokens=480, tied=True)
    recipe = small(yaml.safe_load(path.read_text("utf-8")), tmp_path)
    recipe.update(base="base", control=False, samples=[])
    recipe["learn"].update({"train_bytes": None, "workers": 1})
    for key in ("tokens", "replace"):
        if isinstance(recipe["learn"].get(key), int):
            recipe["learn"][key] = 8
    for stage in recipe["train"]["stages"]:
        stage.update(max_steps=2, block_size=64, max_bytes=None, batch_size=1, measurements=1)
        stage.update(gradient_accumulation=1, dtype=None)  # bitsandbytes is no part of the tests
    recipe["eval"] = {**recipe.get("eval", {}), "max_bytes": 2000, "speed_characters": 8}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), "utf-8")
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    run(tmp_path / "recipe.yaml", output=tmp_path / "run")
    assert check(tmp_path / "run" / "merged").ok
    if path.stem == "term-list":
        lines = (tmp_path / "run" / "vocab" / "new_tokens.jsonl").read_text("utf-8").splitlines()
        texts = [text for line in lines if (text := json.loads(line)["text"])]
        assert texts  # terms and what they are joined of, nothing else
        assert all(any(text.strip() in term for term in TERMS) for text in texts)
