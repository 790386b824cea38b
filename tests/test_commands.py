"""Every command of the README and the docs is run, on tiny real models, or says why it is not.

What stands in a `console` block is run in the order of its page, in a folder that holds what the
pages take for granted (BASE, field.txt ...; `World` below makes them). Of a block with lines that
begin with `$ `, these lines are the commands and the others their output. Sizes are cut down
(`fast`). A block behind `<!-- not run: REASON -->` is only parsed, by the real command line.
Python blocks are run in the same folder, and a YAML block whose first line is `# NAME` is written
to that file.
"""

import json
import re
import shlex
import shutil
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import typer
import yaml
from typer.testing import CliRunner

import adapter_parts
import extend
import parts
from lexigraft import graft, learn, merge, pipeline, train
from lexigraft.cli import app
from lexigraft.models.load import FLOATS, QUANTISED
from lexigraft.recipe import Recipe, TrainStage

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def name_of(page):
    return page.relative_to(ROOT).as_posix()


@cache
def blocks(page):
    return [
        SimpleNamespace(**found.groupdict()) for found in BLOCK.finditer(page.read_text("utf-8"))
    ]


def commands(block):
    """The commands of a console block, each as its words."""
    text = re.sub(r"<<'(\w+)'\n.*?^\1$", "", block.text, flags=re.MULTILINE | re.DOTALL)
    lines = text.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@cache
def group():
    return typer.main.get_command(app)


def parse(words, *, whole=True):
    """Hold the words behind `lexigraft` against the command line; not `whole`: parts may lack."""
    if words[:1] == ["--version"]:
        return
    verb = group().get_command(None, words[0])
    assert verb is not None, f"no such verb: {words}"
    if "--help" in words:
        return
    try:
        verb.make_context(words[0], list(words[1:]))
    except Exception as fault:  # typer brings a copy of click, or uses click itself, by its version
        if whole or type(fault).__name__ != "MissingParameter":
            raise AssertionError(f"{' '.join(words)}: {fault}") from fault


def test_every_block_can_be_read():
    """Each block has a language, and is what it says."""
    seen = 0
    for page in PAGES:
        fences = re.findall(r"^```", page.read_text("utf-8"), re.MULTILINE)
        assert len(fences) == 2 * len(blocks(page)), f"{name_of(page)}: an unclosed block"
        for block in blocks(page):
            assert block.language in ("console", "python", "text", "yaml", "json"), name_of(page)
            if block.language == "python":
                compile(block.text, name_of(page), "exec")
            elif block.language == "json":
                json.loads(block.text)
            elif block.language == "yaml":
                content = yaml.safe_load(block.text)
                if "corpus" in content:
                    Recipe.parse(content, where=name_of(page))
            seen += 1
    assert seen > 60


def test_every_command_that_is_named_parses():
    """In blocks that are not run, too, and between words, where a command may be cut short."""
    for page in PAGES:
        for block in blocks(page):
            if block.language != "console":
                continue
            for words in commands(block):
                if "lexigraft" in words:
                    parse(words[words.index("lexigraft") + 1 :])
                elif block.why is None:
                    check_other(words, page)
        prose = BLOCK.sub("", page.read_text("utf-8"))
        for quoted in re.findall(r"`(lexigraft [a-z][^`]*)`", prose):
            text = " ".join(quoted.replace("\\|", "|").split())
            if "..." not in text and "|" not in text:
                parse(shlex.split(text)[1:], whole=False)


def check_other(words, page):
    """Commands of other programs that are not run: what they name is there."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    elif words[:2] == ["pip", "install"]:
        for name in words[2:]:
            for extra in re.findall(r"lexigraft\[(\w+)\]", name):
                assert re.search(rf"^{extra} = ", (ROOT / "pyproject.toml").read_text(), re.M)
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), words
    else:
        pytest.fail(f"{name_of(page)}: {words[0]} needs a line `<!-- not run: REASON -->`")


class World:
    """Inputs by the names that the docs call them, each made when it is first asked for."""

    def __init__(self, root):
        self.root = root

    def __call__(self, name):
        path = self.root / name
        if not path.exists():
            MAKERS[name](self, path)
            assert path.exists(), name
        return path

    def trained(self, model, path, **options):
        train(
            self(model), corpus=[self("field.txt")], output=path, max_steps=2, block_size=64,
            measurements=1, **options,
        )  # fmt: skip

    def learned(self, path, **options):
        options = {"corpus": [self("field.txt")], "allow_more": True, "workers": 1, **options}
        learn(self("BASE"), output=path, **options)


def text(content):
    return lambda world, path: path.write_text(content, "utf-8")


def copy_of(name):
    return lambda world, path: shutil.copytree(world(name), path)


def base(world, path):
    parts.write_byte_level(path)  # 382 tokens, the last two special
    parts.write_model(path, tokens=382, rows=416, tied=True, eos=380)


def notes(world, path):
    path.mkdir()
    rows = [line.replace('"', "") for line in parts.corpus_text(3, documents=30).splitlines()]
    (path / "a.csv").write_text("".join(f'"{row}"\n' for row in ["findings", *filter(None, rows)]))


def stale(world, path):
    """tokenizer.model was extended, and the old tokenizer.json left beside it."""
    parts.write_sentencepiece(path)
    longer = extend.extend(path, path.with_name("longer"), 12)
    shutil.copyfile(longer / "tokenizer.model", path / "tokenizer.model")


def raised(world, path):
    shutil.copytree(world("BASE"), path)
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**content, "vocab_size": 600}))


def neurology(world, path):
    """A model with words of its own: grafted with another vocabulary, and trained."""
    vocab, grown = path.with_name("neuro-vocab"), path.with_name("neuro-model")
    world.learned(vocab, tokens=12, corpus=[world("other.txt")], min_count=5)
    graft(world("BASE"), vocab, output=grown)
    world.trained(grown.name, path)


def chat(world, path):
    from transformers import AutoTokenizer

    model = adapter_parts.load(world("BASE"))
    adapter_parts.move_what_trains(model)
    tokenizer = AutoTokenizer.from_pretrained(world("BASE"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def finished(world, path):
    recipe = world.root / "finished.yaml"
    texts = {"corpus": str(world("field.txt")), "general": str(world("everyday.txt"))}
    recipe.write_text(yaml.safe_dump({"base": str(world("BASE")), **texts}))
    shorten(recipe)
    pipeline.run(recipe, output=path)


def merged(adapter):
    return lambda world, path: merge(world("BASE"), [world(adapter)], output=path)


MAKERS = {
    "field.txt": text(parts.corpus_text(documents=120)),
    "everyday.txt": text(parts.ENGLISH.read_text("utf-8")),
    "heldout.txt": text(parts.corpus_text(1, documents=6)),
    "other.txt": text(parts.corpus_text(2, documents=60).replace("itis", "ia").replace("炎", "病")),
    "en.txt": text(parts.corpus_text(5, documents=20)),
    "zh.txt": text(parts.corpus_text(6, documents=20)),
    "wikitext.txt": text(parts.plain_english()[:20_000]),
    "neighbour.txt": text(parts.corpus_text(4, documents=20)),
    "entries.txt": text("\n\n".join(f"冠状动脉 潜伏性感染 {n}" for n in range(60))),
    "terms.txt": text("冠状动脉\n心肌梗死\t3\n 心肌梗死\n\ncarditis\n"),
    "words.txt": text("冠状动脉\n潜伏性感染\n"),
    "meanings.tsv": text("冠状动脉\t the arteries of the heart\n潜伏性感染\t a latent infection\n"),
    "keep.txt": text("脑出血\n"),
    "never.txt": text("the\n"),
    "marks.txt": text("<|diagnosis|>\n"),
    "unwanted.txt": text(" garden\n another\n"),
    "notes": notes,
    "domain.model": lambda world, path: path.write_bytes(
        (
            parts.write_sentencepiece(path.with_name("sp"), fast=False) / "tokenizer.model"
        ).read_bytes()
    ),
    "recipe.yml": lambda world, path: path.write_text(
        f"merge_method: linear\nmodels:\n- model: {world('CARDIOLOGY')}\n"
        f"- model: {world('NEUROLOGY')}\nbase_model: {world('BASE')}\ndtype: float32\n"
    ),
    "BASE": base,
    "VOCAB": lambda world, path: world.learned(path, tokens=24, pin=[world("words.txt")]),
    "MODEL": lambda world, path: graft(world("BASE"), world("VOCAB"), output=path),
    "ADAPTER": lambda world, path: world.trained("MODEL", path),
    "MERGED": merged("ADAPTER"),
    "FIRST": copy_of("ADAPTER"),
    "SECOND": lambda world, path: world.trained("MERGED", path),
    "LORA": copy_of("ADAPTER"),
    "cardio-lora": copy_of("ADAPTER"),
    "neuro-lora": neurology,
    "CARDIOLOGY": copy_of("MERGED"),
    "NEUROLOGY": merged("neuro-lora"),
    "MEDICAL": copy_of("MERGED"),
    "CHAT": chat,
    "TUNED": copy_of("MERGED"),
    "OTHER": copy_of("MERGED"),
    "STALE": stale,
    "RAISED": raised,
    "BROKEN": raised,
    "neuro-model": neurology,
    "RUN": finished,
}


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


SMALL = {
    "--drop": "10%",
    "--tokens": "6",
    "--replace": "6",
    "--keep": "395",
    "--id": "385",
    "--max-bytes": "4000",
}
BRIEF = {
    "learn": ["--workers", "1"],
    "train": ["--max-steps", "2", "--block-size", "64", "--measurements", "1"],
    "eval": ["--max-bytes", "2000", "--speed-characters", "8"],
}


def fast(words):
    """The same command with its sizes cut down."""
    words = [
        SMALL.get(before, word) if re.fullmatch(r"\d+%?", word) else word
        for before, word in zip(["", *words], words, strict=False)
    ]
    if words[:2] == ["graft", "BASE"] and "distill" in words:
        words += ["--max-bytes", "2000"]
    return [*words, *BRIEF.get(words[0], ())]


def shorten(recipe):
    """A recipe whose stages take two steps."""
    content = yaml.safe_load(recipe.read_text("utf-8"))
    stages = content.setdefault("train", {}).setdefault("stages", [{"mode": "lora"}])
    for stage in stages:
        stage.update(max_steps=2, block_size=64, measurements=1)
    content.setdefault("eval", {}).update(max_bytes=2000, speed_characters=8)
    recipe.write_text(yaml.safe_dump(content, allow_unicode=True))


def run(words, world):
    """Run a command of lexigraft on small things; its output is not there yet, as for a reader."""
    inputs = list(words)
    for option in ("-o", "--output", "--fix"):
        if option in words:
            output = inputs.pop(inputs.index(option) + 1)
            if output not in inputs:
                shutil.rmtree(output, ignore_errors=True)
    supply(" ".join(inputs), world)
    if words[0] == "run":
        shorten(Path(words[1]))
    done = CliRunner().invoke(app, fast(words))
    allowed = (0, 1) if words[0] == "check" else (0,)  # 1: it found what the page tells of
    if isinstance(done.exception, Exception):
        pytest.fail(f"{' '.join(words)}\n{done.exception}")
    assert done.exit_code in allowed, f"{' '.join(words)}\n{done.output}"
    return told_next(done.stdout)


PLACEHOLDERS = {"TEXT", "OWNER/NAME"}  # what only the reader knows, beside names of outputs


def told_next(printed):
    """The commands that come next, each as its words, all of which are real."""
    found = [shlex.split(line) for line in printed.splitlines() if line.startswith("next:")]
    for words in found:
        assert words[:2] == ["next:", "lexigraft"], words
        parse(words[2:])
        inputs = [
            word
            for before, word in pairwise(words[2:])
            if not word.startswith("-") and before != "-o" and word not in PLACEHOLDERS
        ]
        assert inputs and [word for word in inputs if not Path(word).exists()] == [], words
    return [words[2:] for words in found]


def shown(page):
    """The page's blocks that are run."""
    return [
        b for b in blocks(page) if b.why is None and b.language in ("console", "python", "yaml")
    ]


def supply(text, world):
    """Put what a command or program names, and is not there yet, into the current folder."""
    for name in sorted(set(re.findall(r"[\w.-]+", text)) & MAKERS.keys()):
        if not Path(name).exists():
            copy = shutil.copytree if world(name).is_dir() else shutil.copyfile
            copy(world(name), name)


def walk(found, world):
    """Run blocks one after another, each command on what those before it have made."""
    for block in found:
        if block.language == "yaml" and (place := re.match(r"# ([\w.]+)\n", block.text)):
            Path(place[1]).write_text(block.text, "utf-8")
            supply(block.text, world)
        elif block.language == "python":
            made = re.findall(r'output="([\w-]+)"', block.text)
            for output in made:
                shutil.rmtree(output, ignore_errors=True)
            supply(re.sub("|".join(made), "", block.text) if made else block.text, world)
            exec(block.text, {})
        elif block.language == "console":
            for words in commands(block):
                if words[0] == "lexigraft":
                    run(words[1:], world)


def test_the_first_commands_of_the_readme_run(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    walk(shown(ROOT / "README.md")[1:2], world)
    assert Path("MERGED", "config.json").is_file()


def test_each_verb_says_what_comes_next_and_it_runs(world, tmp_path, monkeypatch):
    """From `learn`, by what is said alone, to a merged model; then what the others say."""
    monkeypatch.chdir(tmp_path)
    said = [["learn", "BASE", "--corpus", "field.txt", "--tokens", "6", "-o", "my words"]]
    while said[-1][0] != "check":
        said += run([{"TEXT": "field.txt"}.get(word, word) for word in said[-1]], world)
    assert [words[0] for words in said] == ["learn", "graft", "train", "merge", "check"]
    others = {
        "split BASE ADAPTER -o PAIR": "check PAIR/base --adapter PAIR/adapter",
        "extract MERGED --base BASE -o 'as one'": "merge BASE 'as one' -o MERGED",
        "blend MERGED BASE --base BASE --method linear -o MEAN": "check MEAN",
        "align MERGED BASE -o ALIGNED": "check ALIGNED/MERGED; check ALIGNED/BASE",
        "prune BASE --corpus field.txt -o SHORT": "check SHORT",
        "prune --undo SHORT -o WHOLE": "check WHOLE",
        "card MERGED": "upload MERGED OWNER/NAME",
        "import axolotl axolotl.yml -o ax.yaml": "run ax.yaml -o RUN",
    }
    Path("axolotl.yml").write_text(
        "{base_model: BASE, adapter: lora, lora_r: 8, lora_alpha: 16, sequence_len: 64,"
        " datasets: [{path: field.txt, type: completion}]}"
    )
    for command, then in others.items():
        found = run(shlex.split(command), world)
        assert "; ".join(map(shlex.join, found)) == then
        said += found
    for words in said:
        if words[0] == "check":
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0, f"{words}\n{done.output}"
    for more in ("--json", "--dry-run"):
        done = CliRunner().invoke(app, ["split", "BASE", "ADAPTER", "-o", "AGAIN", more])
        assert done.exit_code == 0 and "next:" not in done.stdout


@pytest.mark.matrix
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(block.language == "console" for block in shown(page))],
    ids=name_of,
)
def test_the_commands_of_a_page_run(page, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    walk(shown(page), world)


def test_every_setting_of_a_stage_of_training_is_an_option_too():
    """But for `share`, by which stages divide one text."""
    options = {option.name for option in group().commands["train"].params}
    assert TrainStage.model_fields.keys() - options == {"share"}
    dtypes = get_args(get_args(TrainStage.model_fields["dtype"].annotation)[0])
    assert dtypes == ("auto", *FLOATS, *QUANTISED)
