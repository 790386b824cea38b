"""What mkdocs.yml cannot say: pages from outside docs/, and the reference, made from the code.

mkdocs calls the functions whose names begin with `on_`. Links are written as they are in the
repository, where a code host follows them, and turned into those of the site here.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

import lexigraft
from lexigraft import cli
from lexigraft.cli import app

ROOT = Path(__file__).parents[1]
_CODE = ROOT / "src"
# file of the repository -> page of the site, for those outside docs/
OUTSIDE = {
    "README.md": "index.md",
    "README.zh-CN.md": "zh/index.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    **{
        name: name
        for folder in ("bench/results", "examples", "notebooks")
        for name in sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / folder).iterdir())
    },
}
# Commands alone; with `$ ` before them it is a session, which is coloured as one.
_PLAIN_CONSOLE = re.compile(r"^```console\n(?!\$ )", re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name headings as code hosts do, so that a link to one works in both places."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/, and the reference."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for page, content in (
        ("reference/cli.md", command_line()),
        ("reference/python.md", python()),
    ):
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    here = page.file.src_uri
    markdown = _PLAIN_CONSOLE.sub("```bash\n", markdown)
    return site_links(markdown, {to: name for name, to in OUTSIDE.items()}.get(here), here)


def site_links(markdown: str, source: str | None, page: str) -> str:
    """`markdown` with its relative links as the page `page` needs them.

    Args:
        markdown: the text of a file.
        source: where it lies in the repository; None for what is written for the site.
        page: where it lies in the site.
    """
    folder = PurePosixPath(source or f"docs/{page}").parent

    def turned(match: re.Match[str]) -> str:
        target = os.path.normpath(folder / match[1])
        if target not in OUTSIDE and not target.startswith("docs/"):
            return match[1]  # mkdocs says that it leads nowhere
        place = OUTSIDE.get(target, target.removeprefix("docs/"))
        return os.path.relpath(place, PurePosixPath(page).parent)

    return _LINK.sub(turned, markdown)


def command_line() -> str:
    """Every verb with its arguments and options, as the package `cli` declares them."""
    verbs = {verb.name or verb.callback.__name__: verb.callback for verb in app.registered_commands}
    parts = ["# Command line", "", f"{app.info.help} `lexigraft VERB --help` prints the same."]
    parts += ["", "| verb | does |", "|---|---|"]
    parts += [f"| [`{name}`](#{name}) | {_cell(verb.__doc__)} |" for name, verb in verbs.items()]
    for name, verb in verbs.items():
        options = list(_options(verb))
        usage = [option.name for option in options if option.is_argument]
        parts += ["", f"## {name}", "", str(verb.__doc__), ""]
        parts += ["```text", " ".join(["lexigraft", name, *usage, "[OPTIONS]"]), "```", ""]
        parts += ["| option | default | meaning |", "|---|---|---|"]
        parts += [
            f"| `{option.name}`{option.value} | {option.default} | {_cell(option.info.help)} |"
            for option in options
        ]
    parts += ["", "## Exit status", "", _cell(inspect.getdoc(cli).partition("Exit status: ")[2])]
    return "\n".join(parts) + "\n"


@dataclass(frozen=True)
class _Option:
    """An argument or option of a verb, as the table shows it."""

    name: str
    value: str
    default: str
    info: Any
    is_argument: bool


def _options(verb: Callable[..., None]) -> Iterator[_Option]:
    hints = get_type_hints(verb, include_extras=True)
    for name, parameter in inspect.signature(verb).parameters.items():
        kind, info = get_args(hints[name])
        is_argument = isinstance(info, typer.models.ArgumentInfo)
        if is_argument:
            shown = info.metavar or name.upper()
            shown += "..." if get_origin(kind) is list else ""
        else:
            # Inside Annotated the first name stands where a default would.
            given = [info.default, *(info.param_decls or ())]
            names = [one for one in given if isinstance(one, str)]
            shown = "`, `".join(names or [f"--{name.replace('_', '-')}"])
        yield _Option(
            name=shown,
            value="" if is_argument or kind is bool else f" {_value(kind, info)}",
            default=_default(parameter.default, info),
            info=info,
            is_argument=is_argument,
        )


def _value(kind: Any, info: Any) -> str:
    inner = next((one for one in get_args(kind) if one is not type(None)), kind)
    if get_origin(kind) is Literal or get_origin(inner) is Literal:
        choices = get_args(inner) if get_origin(inner) is Literal else get_args(kind)
        return " or ".join(f"`{choice}`" for choice in choices)
    return info.metavar or {int: "N", float: "NUMBER", Path: "PATH"}.get(inner, "TEXT")


def _default(value: Any, info: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    if isinstance(info.show_default, str):
        return _cell(info.show_default)
    return "" if value in (None, False, []) else f"`{value}`"


def _cell(text: str | None) -> str:
    """A text as a cell of a table."""
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;")


def python() -> str:
    """Every function of `lexigraft`, with what it takes, returns and raises, from its docstring."""
    parts = [
        "# Python",
        "",
        "The verbs of the command line are functions of the same names and options "
        "(`eval` is `evaluate`). Each is imported when it is first used: `import lexigraft` "
        "needs no torch. Faults are `LexigraftError`, whose text says what was found, needed, "
        "and what to try.",
    ]
    for name in lexigraft.__all__:
        home = lexigraft._HOMES.get(name, f"lexigraft.steps.{name}")
        if name == "LexigraftError":
            home = "lexigraft.errors"
        definition, tree = _definition(home, name)
        parts += ["", f"## {name}", "", *_described(definition)]
        returned = getattr(definition, "returns", None)
        result = isinstance(returned, ast.Name) and _class(tree, returned.id)
        if result:
            parts += ["", f"### {result.name}", "", *_documented(ast.get_docstring(result) or "")]
    return "\n".join(parts) + "\n"


def _definition(module: str, name: str) -> tuple[ast.FunctionDef | ast.ClassDef, ast.Module]:
    """The source of a function or class; followed once where a package passes it on."""
    path = _CODE.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node, tree
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return _definition(str(node.module), name)
    raise LookupError(f"{module} has no {name}")


def _class(tree: ast.Module, name: str) -> ast.ClassDef | None:
    return next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)


def _described(node: ast.FunctionDef | ast.ClassDef) -> Iterator[str]:
    text = ast.get_docstring(node) or ""
    if isinstance(node, ast.FunctionDef):
        yield from ("```python", *_signature(node), "```", "")
    yield from _documented(text)


def _signature(node: ast.FunctionDef) -> Iterator[str]:
    """One parameter a line, as the source has them."""
    yield f"lexigraft.{node.name}("
    arguments = node.args
    plain = [*arguments.posonlyargs, *arguments.args]
    missing = [None] * (len(plain) - len(arguments.defaults))
    yield from _parameters(plain, [*missing, *arguments.defaults])
    if arguments.kwonlyargs:
        yield "    *,"
        yield from _parameters(arguments.kwonlyargs, arguments.kw_defaults)
    if arguments.kwarg:
        yield f"    **{ast.unparse(arguments.kwarg)},"
    yield f") -> {ast.unparse(node.returns) if node.returns else 'None'}"


def _parameters(arguments: Sequence[ast.arg], defaults: Sequence[ast.expr | None]) -> Iterator[str]:
    for argument, default in zip(arguments, defaults, strict=True):
        value = "" if default is None else f" = {ast.unparse(default)}"
        yield f"    {ast.unparse(argument)}{value},"


def _documented(text: str) -> Iterator[str]:
    """A docstring as Markdown: its sections become lists of names and meanings."""
    in_section = False
    for block in text.split("\n\n"):
        head, *entries = block.split("\n")
        if re.fullmatch(r"(Args|Attributes|Raises|Returns):", head):
            in_section = True
            yield from (f"**{_SECTIONS[head[:-1]]}**", "", *_entries(entries), "")
        elif in_section and head.startswith("    "):
            yield from (*_entries(block.split("\n")), "")
        elif head.startswith(">>>"):
            yield from ("```python", block, "```", "")
        else:
            yield from (block, "")


_SECTIONS = {
    "Args": "Takes",
    "Attributes": "Holds",
    "Raises": "Raises",
    "Returns": "Returns",
}


def _entries(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        text = line.removeprefix("    ")
        name, colon, meaning = text.partition(": ")
        if not text.startswith(" ") and colon:
            names = ", ".join(f"`{one.strip()}`" for one in name.split(","))
            yield f"- {names}: {meaning}"
        else:
            yield f"  {text.strip()}"
