"""The documentation's commands, links and code hold for the program as it is."""

from __future__ import annotations

import ast
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

from anomalyst.cli import app
from anomalyst.evaluation import METRICS
from anomalyst.methods import REGISTRY
from anomalyst.methods.base import methods
from anomalyst.predictions import to_record
from anomalyst.types import Prediction

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[str, str]]:
    return [(found[2], found[3]) for found in FENCE.finditer(text)]


def command_lines(text: str) -> list[str]:
    """Every `anomalyst ...` line of the code blocks, joined where it goes on, without `$ `."""
    joined = [re.sub(r"\\\n\s*", "", code) for _, code in blocks(text)]
    lines = [line.removeprefix("$ ") for code in joined for line in code.splitlines()]
    return [line for line in lines if re.match(r"anomalyst \S", line)]


def parse(line: str) -> None:
    """Let the command line read the words of a command, and run nothing."""
    words = [word for word in shlex.split(line, comments=True)[1:] if word != "--debug"]
    command: Any = typer.main.get_command(app)
    context = command.make_context("anomalyst", list(words), resilient_parsing=True)
    while hasattr(command, "commands"):
        known, name = command.commands, words.pop(0)
        if name.startswith("-"):
            assert name in [text for option in command.params for text in option.opts]
            return
        assert name in known, f"no command {name!r}"
        command = known[name]
    with command.make_context(command.name, words, parent=context):
        pass


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


COMMANDS = [(named(page), line) for page in PAGES for line in command_lines(page.read_text())]


def test_the_parser_of_this_test_refuses_what_the_command_line_refuses() -> None:
    parse("anomalyst fit patchcore data -o bundle --shots 4")
    with pytest.raises(Exception, match="--shotz"):
        parse("anomalyst fit patchcore data -o bundle --shotz 4")
    with pytest.raises(Exception, match=r"(?i)missing"):
        parse("anomalyst fit patchcore -o bundle")
    with pytest.raises(AssertionError, match="fitt"):
        parse("anomalyst fitt patchcore data -o bundle")


def test_commands_were_found() -> None:
    pages = {page for page, _ in COMMANDS}
    assert {"README.md", "docs/index.md", "docs/cli.md", "docs/weights.md"} <= pages


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_parse(page: str, line: str) -> None:
    parse(line)


def test_every_command_is_documented_with_all_its_options() -> None:
    text = (DOCS / "cli.md").read_text()
    command: Any = typer.main.get_command(app)
    for name, sub in command.commands.items():
        section = re.search(rf"^## .*\b{name}\b.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        assert section, f"docs/cli.md has no section on {name}"
        common = text.partition("\n## ")[0]
        for option in sub.params:
            if option.param_type_name == "option" and option.name not in ("help",):
                assert any(flag in section[0] + common for flag in option.opts), (name, option.opts)


def slug(heading: str) -> str:
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{named(page)}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{named(page)}: {target}"


def test_every_page_is_in_the_navigation_and_exists() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    entries = set(re.findall(r"[\w/-]+\.md", navigation))
    assert entries == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_python_compiles_and_imports_what_exists(page: Path) -> None:
    for language, code in blocks(page.read_text()):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("anomalyst"):
                module = import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), code


def test_the_api_page_names_what_exists() -> None:
    for name in re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text(), re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute), name


@pytest.mark.parametrize("name", REGISTRY)
def test_a_method_has_its_row_and_a_page_with_all_its_options(name: str) -> None:
    pytest.importorskip("torch")
    rows = (DOCS / "methods" / "index.md").read_text().splitlines()
    line = next(line for line in methods() if line["name"] == name)
    shown = {True: "yes", False: "no", None: "\N{EN DASH}"}
    values = [shown.get(line[key], line[key]) for key in line if key not in ("name", "summary")]
    assert "| " + " | ".join([f"`{name}`", *map(str, values)]) + " |" in rows
    page = (DOCS / "methods" / f"{name}.md").read_text()
    documented = re.findall(r"^\| `(\w+)` \| (\S+) \|", page, re.MULTILINE)
    fields = REGISTRY[name].load().Options.model_fields
    assert documented == [(key, str(field.default).lower()) for key, field in fields.items()]


def test_the_keys_of_the_files_are_documented() -> None:
    text = (DOCS / "cli.md").read_text()
    for key in [*to_record(Prediction("a.png")), *METRICS]:
        assert f"`{key}`" in text or f".{key}`" in text, key


def test_pictures_stay_small() -> None:
    for picture in (DOCS / "images").glob("*.png"):
        assert picture.stat().st_size < 400_000, picture
