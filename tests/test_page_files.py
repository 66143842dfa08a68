"""The page's files: small, and asking nobody but the station."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "src" / "anomalyst" / "station" / "page"
FILES = sorted(PAGE.iterdir())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_stay_small_and_ask_nobody_else(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    addresses = re.findall(r"https?://[^\s\"'`)]+", text)
    assert set(addresses) <= {"http://www.w3.org/2000/svg"}  # a name, not a place


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".html"], ids=lambda p: p.name)
def test_html_has_no_inline_script_or_style(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "<style" not in text and not re.search(r"\s(style|on\w+)=", text)
    assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", text))
    for place in re.findall(r"(?:src|href)=\"/page/([^\"]+)\"", text):
        assert (PAGE / place).is_file()


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".js"], ids=lambda p: p.name)
def test_imports_name_what_their_module_exports(path: Path) -> None:
    found = re.findall(r"import \{([^}]*)\} from \"\./([\w.]+)\"", path.read_text())
    for names, module in found:
        text = (PAGE / module).read_text(encoding="utf-8")
        exported = re.findall(r"^export (?:async )?(?:function|class|const) (\w+)", text, re.M)
        assert {name.strip() for name in names.split(",") if name.strip()} <= set(exported)
