"""What the benchmarks share: who, when and where of a measurement, and tables kept between markers in the documents."""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def parser(description: str, out: Path | None) -> argparse.ArgumentParser:
    """A command line with the options that all benchmarks have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--hardware", help="the hardware in words")
    made.add_argument("--commit", help="default: asked from git")
    made.add_argument("--out", type=Path, default=out)
    return made


def add_sampling_options(made: argparse.ArgumentParser) -> None:
    """What is sampled by the benchmarks of speed."""
    made.add_argument("--model", default="DiT-XL/2")
    made.add_argument("--input-size", type=int, default=32, help="side of the latent; 32 is 256 px, 64 is 512 px")
    made.add_argument("--guided", type=int, nargs="+", default=[1, 8, 64], help="images, each with its unconditional twin")


def header(arguments: argparse.Namespace) -> dict[str, Any]:
    """Date, commit, JAX version and hardware."""
    commit = arguments.commit
    if not commit:
        commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True, cwd=ROOT).strip()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "jax": jax.__version__,
        "hardware": arguments.hardware or jax.devices()[0].device_kind,
    }


def source(document: dict[str, Any]) -> str:
    """The header in words."""
    return f"{document['hardware']}, {document['date']}, commit {document['commit']}, JAX {document['jax']}"


def write(document: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def continued(document: dict[str, Any], path: Path, keys: tuple[str, ...]) -> tuple[dict[str, Any], list[str]]:
    """The results stored in ``path`` if they are of the same run, or else ``document``, with the keys in which they differ."""
    if not path.exists():
        return document, []
    stored = json.loads(path.read_text())
    different = [key for key in keys if stored.get(key) != document[key]]
    return (document if different else stored), different


def with_interval(figure: Mapping[str, float]) -> str:
    """A mean and the ends of its interval, as they are stored, for a table."""
    return f"{figure['mean']:.1f} ({figure['low']:.1f} to {figure['high']:.1f})"


def refuse_unlike(documents: list[dict[str, Any]], keys: tuple[str, ...]) -> None:
    """Ends the program with a sentence where documents to be joined differ in one of these."""
    different = [key for key in keys if any(document[key] != documents[0][key] for document in documents)]
    if different:
        raise SystemExit(f"Error: {', '.join(different)} differ; join results of one commit, hardware and setting only.")


def put_table(page: Path, script: str, text: str) -> None:
    """Replaces what stands between the script's markers in a document."""
    start, end = f"<!-- table: benchmarks/{script} -->", "<!-- end of table -->"
    head, rest = page.read_text().split(start)
    page.write_text(f"{head}{start}\n{text}\n{end}{rest.split(end, 1)[1]}")
