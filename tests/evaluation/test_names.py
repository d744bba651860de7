"""A figure of SQNR over steps is never shown without its name: tables in documents, cards, reports and the benchmarks' code."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import ablation, digits
from ptq4dit_jax.evaluation import SQNR_MEAN, SQNR_POOLED, write_report

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("models/*/README.md")])
NAMES = ["SQNR, mean over steps (dB)", "SQNR, pooled over steps (dB)"]


def headings(page: str) -> list[list[str]]:
    """The cells of every table's first row."""
    rows = re.findall(r"^ *\|(.+)\| *\n *\|[-| :]+\| *$", page, re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in rows]


def faults(page: str) -> list[list[str]]:
    """Headings with a figure of SQNR under another name than the two, or with one of the two alone."""
    found = []
    for cells in headings(page):
        named = [cell for cell in cells if re.search(r"SQNR|over steps|mean of steps|pooled|^dB$", cell)]
        if named not in ([], NAMES):
            found.append(cells)
    return found


def test_the_names():
    assert [SQNR_MEAN, SQNR_POOLED] == NAMES


@pytest.mark.parametrize(
    "heading",
    [
        "| model | SQNR of predicted noise |",
        "| a | SQNR, mean over steps (dB) | PSNR |",
        "| W8A8 | dB |",
        "| | mean of steps | pooled |",
    ],
)
def test_a_table_of_another_name_would_be_found(heading):
    rule = "|" + "---|" * (heading.count("|") - 1)
    assert len(faults(f"text\n\n{heading}\n{rule}\n| x | 1 |\n")) == 1
    assert not faults(f"| model | {NAMES[0]} | {NAMES[1]} | PSNR (dB) |\n|---|---|---|---|\n")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_and_cards(path):
    assert not faults(path.read_text())


def test_there_are_such_tables():
    tables = [cells for path in DOCUMENTS for cells in headings(path.read_text())]
    assert sum(NAMES[0] in cells for cells in tables) >= 5


def test_reports(comparison, tmp_path):
    page = (write_report(tmp_path / "report", comparison, title="x", settings={}) / "report.md").read_text()
    assert not faults(page)
    assert any(cells[1:3] == NAMES for cells in headings(page))


@pytest.mark.parametrize(
    ("script", "results"),
    [(digits, digits.RESULTS), *((ablation, results) for results in ablation.TABLES)],
    ids=lambda value: value.stem if isinstance(value, Path) else "",
)
def test_tables_of_benchmarks_are_those_of_their_results(script, results):
    """What is stored has both figures, and the document shows what is stored."""
    text = script.markdown(json.loads(results.read_text()))
    assert not faults(text)
    page = script.CARD if script is digits else script.PAGE
    assert text in page.read_text()
