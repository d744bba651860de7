"""What commands share at the edges: progress, tables, inputs from strings and files, outputs written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ptq4dit_jax import checkpoints, sharding
from ptq4dit_jax.dit import DiTConfig
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.model import FloatDiT

console = Console(highlight=False, soft_wrap=True)


@contextlib.contextmanager
def stages(console: Console = console) -> Iterator[Callable[[str, int, int], None]]:
    """A live list of stages, each with a bar; yields ``report(stage, done, total)``."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield report


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of one shape as a table; the keys of the first are the headings."""
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    for key, value in rows[0].items():
        table.add_column(key.replace("_", " "), justify="right" if isinstance(value, (int, float)) else "left")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)


def devices_line() -> str:
    """The devices that will be used, in words."""
    kinds = [device.device_kind for device in jax.devices()]
    return f"{len(kinds)} x {kinds[0]} ({jax.default_backend()})"


def all_devices_mesh() -> jax.sharding.Mesh | None:
    """A mesh over all devices, or None where there is one."""
    return sharding.data_mesh() if jax.device_count() > 1 else None


def megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def load_model(name: str) -> checkpoints.Model:
    """A model folder, or ``random:PRESET[@SIZE]``: a published size with random weights, for trying things out."""
    if not name.startswith("random:"):
        return checkpoints.load(name)
    preset, _, size = name.removeprefix("random:").partition("@")
    if size and not size.isdigit():
        raise Ptq4ditError(f"The latent size in {name!r} must be a number, for example random:DiT-S/2@32.")
    return FloatDiT.init(DiTConfig.preset(preset, input_size=int(size or 32)), jax.random.key(0))


def parse_labels(text: str, repeat: int = 1) -> np.ndarray:
    """``0-9``, ``3`` or ``0-4,7,7`` to (N,) int32, the whole list ``repeat`` times."""
    labels: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise Ptq4ditError(f"Labels {text!r} must be numbers and ranges such as 0-9 or 1,3,5-7.")
        labels += range(int(match[1]), int(match[2] or match[1]) + 1)
    if repeat < 1:
        raise Ptq4ditError(f"--repeat must be positive, not {repeat}.")
    return np.array(labels * repeat, np.int32)


def read_arrays(path: str | os.PathLike[str], names: Sequence[str]) -> dict[str, np.ndarray]:
    """The named arrays of an npz file, without ever unpickling; absent ones are left out."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in file}
    except (OSError, ValueError, BadZipFile, TypeError, AttributeError) as error:
        raise Ptq4ditError(f"{os.fspath(path)} cannot be read as an .npz file of plain arrays ({error}).") from error


def check_target(path: Path, overwrite: bool) -> None:
    """Refuses an output that exists (unless ``overwrite``) or cannot be made, before any long work."""
    target = path.expanduser().absolute()
    if target.exists() and not overwrite:
        raise Ptq4ditError(f"{path} exists; choose another path, or pass --overwrite to replace it.")
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise Ptq4ditError(f"Cannot write {path}: {parent} is not a folder that you may write to.")


def write_file(path: Path, write: Callable[[Any], None]) -> Path:
    """Writes a file beside its place and moves it there when complete; returns the absolute path."""
    target = path.expanduser().absolute()
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            temporary = Path(file.name)
            write(file)
        temporary.chmod(0o644)
        temporary.replace(target)
    except OSError as error:
        raise Ptq4ditError(
            f"Cannot write {path} ({error.strerror or error}); check its permissions and the free space."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return target


def write_json(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Writes a command's figures as JSON, if a path was asked for."""
    if path is not None:
        text = json.dumps(figures, indent=2) + "\n"
        console.print(f"Figures: {write_file(path, lambda file: file.write(text.encode()))}")
