"""`import`: a configuration of Axolotl or LLaMA-Factory as a recipe, where it means the same.

Each key is mapped, or left out with a reason, or stops the import where leaving it out would
change what is learned. What a configuration leaves to its tool's defaults is written out, so that
the recipe says what the tool would have done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lexigraft.console import plain_line
from lexigraft.errors import LexigraftError
from lexigraft.files import make_folder, refuse_existing, refuse_overwriting, write_whole
from lexigraft.importing import axolotl, llamafactory
from lexigraft.importing.translation import Row, Tool, Translation
from lexigraft.recipe import Recipe, read_yaml

TOOLS: dict[str, tuple[Tool, Callable[[Translation], None]]] = {
    "axolotl": (axolotl.TOOL, axolotl.translate),
    "llamafactory": (llamafactory.TOOL, llamafactory.translate),
}
_LISTS = ("pin", "special")


@dataclass(frozen=True)
class ImportResult:
    """What became of a configuration.

    Attributes:
        output: the recipe.
        tool: name and version of the tool whose keys these are.
        recipe: the text of the recipe.
        files: every file written, the recipe last.
        rows: what became of each key, and what the recipe does beyond the configuration.
        dry_run: nothing was written.
    """

    output: Path
    tool: str
    recipe: str
    files: tuple[Path, ...]
    rows: tuple[Row, ...]
    dry_run: bool

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "output": str(self.output),
            "tool": self.tool,
            "recipe": self.recipe,
            "files": [str(path) for path in self.files],
            "rows": [row.to_json() for row in self.rows],
            "dry_run": self.dry_run,
        }

    def lines(self) -> list[str]:
        """What a person reads."""
        groups = {
            "mapped": [row for row in self.rows if row.key and row.place],
            "left out": [row for row in self.rows if not row.place],
            "beyond it": [row for row in self.rows if not row.key],
        }
        found = [f"{'would write' if self.dry_run else 'wrote'} {', '.join(map(str, self.files))}"]
        for name, rows in groups.items():
            found += [f"{name}:", *(f"  {row.line()}" for row in rows)] if rows else []
        return found


def import_config(
    tool: str,
    config: str | Path,
    *,
    output: str | Path = "recipe.yaml",
    force: bool = False,
    dry_run: bool = False,
) -> ImportResult:
    """Translate a configuration of another tool into a recipe.

    Paths in it start, as for that tool, from the current folder; those in the recipe from the
    recipe's own. Tokens that it adds are written to lists beside the recipe.

    Args:
        tool: `axolotl` or `llamafactory`.
        config: its YAML file.
        output: the recipe to write.

    Raises:
        RefusalError: it says what no recipe can: training on chats, another optimizer, a part of a
            data set, an unknown key ...; all such keys in one message.
        LexigraftError: no YAML file, or values that the recipe's parser refuses.
    """
    if tool not in TOOLS:
        raise LexigraftError(
            f"configurations of {tool}",
            needed=" or ".join(TOOLS),
            fix="lexigraft import axolotl CONFIG",
        )
    about, translate = TOOLS[tool]
    config, output = Path(config), Path(output)
    data = read_yaml(config, f"a configuration of {about.name}")
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise LexigraftError(
            f"{config} holds no keys",
            needed=f"a configuration of {about.name}",
            fix=f"head {config}",
        )
    t = Translation(about, dict(data), output.absolute().parent)
    translate(t)
    t.finish()
    recipe = _recipe(t, output)
    Recipe.parse(recipe, where=str(config))
    text = _written(t, config, recipe)
    texts = {output.with_name(name): _lines(t.lists[end]) for end, name in _files(t, output)}
    result = ImportResult(
        output, f"{about.name} {about.version}", text, (*texts, output), tuple(t.rows), dry_run
    )
    refuse_overwriting(output, [config])
    for path in result.files:
        refuse_existing(path, force=force)
    if not dry_run:
        make_folder(output.absolute().parent)
        for path, content in {**texts, output: text}.items():
            write_whole(path, content)
    return result


def _files(t: Translation, output: Path) -> list[tuple[str, str]]:
    """The lists beside the recipe: which, and the file's name."""
    return [(end, f"{output.stem}.{end}.txt") for end in t.lists]


def _lines(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in dict.fromkeys(lines))


def _recipe(t: Translation, output: Path) -> dict[str, Any]:
    """The recipe as plain data, in the order in which people write one."""
    names = dict(_files(t, output))
    learn: dict[str, Any] = {"tokens": "auto"}
    learn.update({end: [names[end]] for end in _LISTS if end in names})
    t.beyond("new words", "learn.tokens: auto", "as many as the texts support; or a number")
    t.beyond("a control", "control: true", "the same training without new words; or false")
    keys = ("base", "corpus", "seed")
    parts: dict[str, Any] = {"learn": learn}
    if "starts" in names:
        parts["graft"] = {"init_from": names["starts"]}
    parts["train"] = {"stages": [t.stage]}
    if "eval" in t.recipe:
        parts["eval"] = t.recipe["eval"]
    return {**{key: t.recipe[key] for key in keys if key in t.recipe}, **parts, "control": True}


def _written(t: Translation, config: Path, recipe: dict[str, Any]) -> str:
    """The recipe's text: what was left out stands above it."""
    head = [f"From {config.name}, a configuration of {t.tool.name}, by `lexigraft import`."]
    left = [row for row in t.rows if not row.place]
    head += ["Left out:", *(f"  {row.line()}" for row in left)] if left else []
    body = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)
    return "".join(f"# {plain_line(line)}\n" for line in head) + body
