"""The documentation is plain, its links lead somewhere, and its Python is Python."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "RELEASE")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "recipes").rglob("README.md")),
    ROOT / "benchmarks" / "README.md",
]
WRITTEN = [page for page in PAGES if page.name != "commands.md"]  # the words of that page are those of `--help`
FENCE = re.compile(r"^( *)(`{3,})(\w*)\n(.*?)^\1\2 *$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)\)")
MOST_WORDS = 30


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def sentences(text: str) -> Iterator[str]:
    """Sentences of prose: code, tables and what stands below them, comments and addresses are left out."""
    text = FENCE.sub("\n\n", text)
    text = re.sub(r"<!-- (table|files).*?<!-- end -->|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"(?m)^ *\|.*$", "\n", text)
    text = re.sub(r"(?m)^( *([-*]|\d+\.) )", r"\n\1", text)  # an item is a paragraph
    text = re.sub(r"(?m)^(#.*)$", r"\n\1\n", text)
    text = re.sub(r"<https?:[^>]*>", "address", text)
    text = LINK.sub(r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    for paragraph in re.split(r"\n\s*\n", text):
        yield from re.split(r"(?<=[.!?:])\s+(?=[A-Z0-9*\[(\"]|code)", " ".join(paragraph.split()))


def words(sentence: str) -> int:
    return sum(any(sign.isalnum() for sign in word) for word in sentence.split())


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as MkDocs and GitHub make them."""
    headings = re.findall(r"(?m)^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_no_sentence_is_long(page: Path) -> None:
    long = [each for each in sentences(page.read_text(encoding="utf-8")) if words(each) > MOST_WORDS]
    assert not long, "\n".join(f"{words(each)} words: {each}" for each in long)


def test_a_long_sentence_is_noticed_and_what_is_no_prose_is_not() -> None:
    prose = "A [word](an/address.md) and `some code here`. " + "Word " * 31 + "\n\n- item\n- another\n"
    kept = [each for each in sentences(prose) if words(each) > MOST_WORDS]
    assert [words(each) for each in kept] == [31]
    assert max(map(words, sentences("# Title\n\n| " + "cell " * 40 + "|\n\n```\n" + "code " * 40 + "\n```\n"))) == 1


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for _, target in LINK.findall(text):
        if re.match(r"\w+:", target):
            assert target.startswith("https://"), target
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target} leads nowhere"
        if anchor:
            assert anchor in anchors(there), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_of_python_are_python(page: Path) -> None:
    for indent, _, language, code in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            compile(re.sub(f"(?m)^{indent}", "", code), name(page), "exec")


def test_the_interface_that_the_pages_show_is_there() -> None:
    """Every `ssmprune.x` in a block of Python is exported."""
    import ssmprune_cli

    shown = {
        word
        for page in PAGES
        for _, _, language, code in FENCE.findall(page.read_text(encoding="utf-8"))
        if language == "python"
        for word in re.findall(r"\bssmprune\.(\w+)", code)
    }
    assert {"load", "compress", "prepare", "restore"} <= shown <= set(ssmprune_cli.__all__)
