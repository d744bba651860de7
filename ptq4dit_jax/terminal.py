"""What commands share at the edges: progress, tables, inputs from strings and files, outputs written whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import jax
import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ptq4dit_jax import checkpoints, memory, processes, sampling, sharding
from ptq4dit_jax.calibration import CalibrationData
from ptq4dit_jax.checkpoints import foreign, store
from ptq4dit_jax.checkpoints.addresses import address_of, copy_command, refuse_address
from ptq4dit_jax.devices import default, default_kind, host, in_use
from ptq4dit_jax.edges import edge, quoted, shown, whole_number
from ptq4dit_jax.engine import QuantizedDiT, choice
from ptq4dit_jax.engine.backends import Arithmetic
from ptq4dit_jax.errors import Ptq4ditError, printable
from ptq4dit_jax.model import FloatDiT, has_nonfinite
from ptq4dit_jax.networks.dit import LARGEST, DiTConfig
from ptq4dit_jax.npz_file import read_npz
from ptq4dit_jax.progress import StageProgress
from ptq4dit_jax.staging import claim, place, write_whole
from ptq4dit_jax.unfinished import expect
from ptq4dit_jax.vae import VAEDecoder


class _Console(Console):
    """A console that shows control characters as escapes, so that text from a file cannot act on the terminal."""

    def render_str(self, text: str, **options: Any) -> Text:  # Any, as in rich
        return super().render_str(printable(text), **options)


# Without markup and emoji, paths are printed as they are, whatever brackets and colons they contain.
console = _Console(highlight=False, markup=False, emoji=False, soft_wrap=True)

_Model = TypeVar("_Model", bound=checkpoints.Model)


@contextlib.contextmanager
def stages(console: Console = console) -> Iterator[StageProgress]:
    """Shows a live list of stages, each with a bar and the times elapsed and left; yields ``report(stage, done, total)``."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int, note: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total, note=note)
            progress.update(tasks[stage], completed=done, total=total, note=note)

        yield report


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Shows activity while something runs that has no parts to count."""
    with console.status(Text(printable(what))):
        yield


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows with equal keys as a table; the first row's keys are the headings. Columns that are empty in every row are
    left out."""
    rows = [{key: value for key, value in row.items() if any(other[key] != "" for other in rows)} for row in rows]
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    for key, value in rows[0].items():
        # The first column names the row, so it is never cut off.
        table.add_column(
            key.replace("_", " "), justify="right" if isinstance(value, (int, float)) else "left", no_wrap=not table.columns
        )
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)


def print_layers(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints what :func:`ptq4dit_jax.describe` returns."""
    print_table("Layers", [{key: value for key, value in row.items() if key != "integer"} for row in rows])


def devices_line() -> str:
    """Describes the devices that will be used."""
    devices = in_use()
    owners = len({device.process_index for device in devices})
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})" + (
        f" in {owners} processes" if owners > 1 else ""
    )


def to_run(model: _Model, dtype: str, backend: str) -> _Model:
    """Returns the model to sample from, with the requested type and backend. The type ``auto`` means bfloat16 for a quantized
    model on an accelerator, and otherwise the model's own: for a float model the stored one, or float32 for float16."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise Ptq4ditError(f"The type to compute in must be auto, float32, bfloat16 or float16, not {dtype!r}.")
    device = default_kind()
    quantized = isinstance(model, QuantizedDiT)
    if asked := choice.named(backend):
        if not (quantized or asked.takes_float_models):
            raise Ptq4ditError(f"The backend {asked.name} runs quantized models, and this model is float; use auto or xla.")
        if asked.unfit(device):
            raise Ptq4ditError(f"The backend {asked.name} needs {asked.needs}; use auto or xla.")
    if not quantized:
        return model if dtype == "auto" else cast(_Model, model.astype(dtype))
    if dtype == "auto":
        dtype = model.dtype.name if device.platform == "cpu" else "bfloat16"
    choice.resolve(backend, dtype)  # refuses an impossible pair
    return cast(_Model, dataclasses.replace(cast(Any, model), dtype=dtype, backend=backend))


def runs_line(model: checkpoints.Model) -> str:
    """Says in which type the model computes and, if quantized, what runs the products of its layers."""
    if not isinstance(model, QuantizedDiT):
        computed, stored = model.dtype.name, model.param_dtype.name
        return f"in {computed}" + (f" (stored in {stored})" if stored != computed else "")
    if not model.sites and not any(layer.integer for layer in model.linears.values()):
        return f"in {model.dtype} on de-quantized weights"
    chosen = model.backend_choice
    products = "integer products" if chosen.backend.arithmetic is Arithmetic.INT8 else chosen.backend.arithmetic.value
    return f"in {model.dtype}, {products} by {chosen.name}" + (f" ({chosen.why})" if chosen.why else "")


def calibration_line(data: CalibrationData, given: int) -> str:
    """Says which rows calibration uses, out of ``given`` ones."""
    line = f"Calibrating on {data.num_steps} steps of {data.num_rows} rows"
    if data.t.ndim > 1:
        line += " that are neighbours in time, each at its own timestep, as the timesteps have unequal or small numbers of rows"
    left = given - data.num_steps * data.num_rows
    return line + (f"; {left} of {given} rows left out, to make steps of equal size" if left else "")


def all_devices_mesh(model: int = 1) -> jax.sharding.Mesh | None:
    """Returns a mesh over all devices, or over those that ``jax_default_device`` names; None if that is one device. So many
    devices as ``model`` says hold a model between them."""
    devices = in_use()
    return sharding.data_mesh(devices, model=model) if len(devices) > 1 or model != 1 else None


def megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


@contextlib.contextmanager
def copied(path: str, part: str = "transformer") -> Iterator[Path]:
    """Yields a local copy of what is at an address, until the block ends, with a bar in megabytes; or the path as it is."""
    with contextlib.ExitStack() as stack:
        with stages() if address_of(path) is not None else contextlib.nullcontext() as report:
            progress = None if report is None else lambda done, total: report("copy (MB)", done, total)
            where = stack.enter_context(foreign.local_copy(path, part, progress))
        yield where


def load_vae(path: str, scale: float | None) -> VAEDecoder:
    """Loads the VAE of ``--vae`` and ``--vae-scale``; prints what was decided and guessed."""
    with copied(path, "vae") as where, working(f"Reading {path}"):
        vae, found = foreign.import_vae(where, scaling_factor=scale)
    for note in found.notes:
        console.print(f"VAE: {note}")
    for guess in found.guesses:
        console.print(f"VAE: the file does not tell its {guess}")
    return vae


def load_model(name: str, *, shared_by: int = 1) -> checkpoints.Model:
    """Loads a model folder, a foreign checkpoint, or what is at the address of either; or makes ``random:PRESET[@SIZE]``, a
    published size with random weights, for trying things out. A model that several devices are to share is left on the host,
    because it need not fit into one of them."""
    if shared_by > 1:
        with jax.default_device(host()):
            return load_model(name)
    if not name.startswith("random:"):
        with copied(name) as where, working(f"Reading {name}"):
            model, notes = checkpoints.load_noted(where)
        for note in notes:
            console.print(note)
        if bad := has_nonfinite(model):
            raise Ptq4ditError(f"The model in {name} holds NaN or infinity in {', '.join(bad[:3])}, so it is of no use.")
        return model
    preset, _, size = name.removeprefix("random:").partition("@")
    if (side := whole_number(size or "32")) is None:
        raise Ptq4ditError(f"The latent size in {quoted(name)} must be a number, for example random:DiT-S/2@32.")
    config = DiTConfig.preset(preset, input_size=side)
    memory.check_fits(f"The model {name}", 4 * config.num_parameters, memory.free_bytes([default()]), "choose a smaller preset")
    with working(f"Drawing {name}"):
        return FloatDiT.init(config, key=jax.random.key(0))


def parse_labels(text: str, repeat: int = 1) -> np.ndarray:
    """Parses ``0-9``, ``3`` or ``0-4,7,7`` to (N,) int32, the whole list ``repeat`` times."""
    if repeat < 1:
        raise Ptq4ditError(f"--repeat must be positive, not {repeat}.")
    ranges, count = [], 0
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)(?:-([0-9]+))?\s*", part)
        ends = [end for end in match.groups() if end] if match else []
        for end in ends:
            if (number := whole_number(end)) is None or number > LARGEST["num_classes"]:
                raise Ptq4ditError(f"Label {shown(end, 40)} is out of range; no model has so many classes.")
        first, last = (int(ends[0]), int(ends[-1])) if ends else (1, 0)
        if last < first:
            raise Ptq4ditError(f"Labels {quoted(text)} must be numbers and ranges such as 0-9 or 1,3,5-7.")
        ranges.append((first, last + 1))
        count += last + 1 - first
        sampling.check_count(count * repeat)
    return np.tile(np.concatenate([np.arange(*ends, dtype=np.int32) for ends in ranges]), repeat)


def wanted_labels(text: str | None, default: str, repeat: int, config: DiTConfig) -> np.ndarray:
    """Returns the labels (N,) int32 for ``--labels`` and ``--repeat``; zeros (repeat,) if the model has no classes."""
    if config.num_labels:
        return parse_labels(default if text is None else text, repeat)
    if text is not None:
        raise Ptq4ditError(
            f"--labels {text}: this model has no classes; leave --labels out, and --repeat is the number of images."
        )
    return parse_labels("0", repeat)


def read_key(seed: int) -> jax.Array:
    """Returns the key of a seed. JAX would reduce other seeds modulo 2^32, so that two seeds would give the same noise."""
    if not 0 <= seed < 2**32:
        raise Ptq4ditError(f"--seed must be 0 to {2**32 - 1}, not {seed}.")
    return jax.random.key(seed)


def read_arrays(path: str | os.PathLike[str], required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Reads the named numeric arrays of an npz file, without ever unpickling; absent optional ones are left out."""
    _check_here(path)
    arrays, present = read_npz(path, (*required, *optional))
    return _checked_arrays(path, arrays, required, present)


def _check_here(path: str | os.PathLike[str]) -> None:
    if (address := address_of(path)) is not None:
        raise Ptq4ditError(f"{address} is an address, where no arrays are read; copy them here with {copy_command(address)}.")


#: The names under which calibration rows may be stored, by our names.
_ROW_NAMES = {"x": ("x", "xs"), "t": ("t", "ts"), "y": ("y", "ys")}


def read_calibration(path: str | os.PathLike[str], *, labelled: bool = True) -> dict[str, np.ndarray]:
    """Reads x, t and, for a ``labelled`` model, y of stored calibration rows, which may also be named xs, ts and ys.

    The file is an npz, one of torch.save, or anything else that :func:`ptq4dit_jax.checkpoints.foreign.open_tensors` reads. No
    code in it is run.
    """
    _check_here(path)
    names = [name for both in _ROW_NAMES.values() for name in both]
    if Path(path).suffix == ".npz" or _is_npz(path):
        found, present = read_npz(path, names)
    else:
        try:
            file = foreign.open_tensors(path)
        except Ptq4ditError as error:
            reason = str(error).rstrip(".")
            raise Ptq4ditError(
                f"The file {os.fspath(path)} cannot be read as calibration rows, an .npz or a file of torch.save ({reason})."
            ) from error
        with edge(path):
            found = {name: file[name].read() for name in names if name in file}
        present = ", ".join(list(file)[:8]) + (", and more" if len(file) > 8 else "")
    if both := [pair for pair in _ROW_NAMES.values() if all(name in found for name in pair)]:
        raise Ptq4ditError(
            f"The file {os.fspath(path)} holds {' and '.join(both[0])}, two names of the same array; keep one of them."
        )
    arrays = {ours: found[name] for ours, pair in _ROW_NAMES.items() for name in pair if name in found}
    return _checked_arrays(path, arrays, ("x", "t", "y") if labelled else ("x", "t"), present)


def _is_npz(path: str | os.PathLike[str]) -> bool:
    """Whether the file is a zip whose first member is a NumPy array."""
    try:
        with Path(path).expanduser().open("rb") as file:
            head = file.read(512)
    except (OSError, RuntimeError):
        return False
    return head.startswith(b"PK\x03\x04") and head[30 : 30 + int.from_bytes(head[26:28], "little")].endswith(b".npy")


def _checked_arrays(
    path: str | os.PathLike[str], arrays: dict[str, np.ndarray], required: Sequence[str], present: str
) -> dict[str, np.ndarray]:
    if missing := [name for name in required if name not in arrays]:
        raise Ptq4ditError(f"The file {os.fspath(path)} must hold the array {', '.join(missing)}; it holds {present}.")
    for name, array in arrays.items():
        if array.dtype.kind not in "iuf" and array.dtype.name != "bfloat16":
            raise Ptq4ditError(f"The array {name} in {os.fspath(path)} must hold numbers, not {array.dtype}.")
    return arrays


def check_target(path: Path | None, overwrite: bool, folder_with: str | None = None) -> None:
    """Refuses an output that exists (unless ``overwrite``) or cannot be made. Called before any long work, and again after it.

    An output is a file, or a folder recognized by the file ``folder_with`` in it; any other folder is never replaced.
    """
    if path is None:
        return
    refuse_address(path)
    if path.name in ("", ".."):  # what is made beside an output, then renamed, needs its name
        raise Ptq4ditError(f"The output {path} has no name of its own; pass the name of a file or folder to make.")
    target = place(path)
    if folder_with == "config.json":
        store.resolve(target)
    try:
        if target.exists():
            if not overwrite:
                raise Ptq4ditError(f"{path} exists; choose another path, or pass --overwrite to replace it.")
            if folder_with is None and target.is_dir():
                raise Ptq4ditError(f"{path} is a folder, which a file cannot replace; choose another path.")
            if folder_with is None and not target.is_file():
                raise Ptq4ditError(f"{path} is a device or the like, which a file does not replace; choose another path.")
            if folder_with and not (target / folder_with).is_file() and not (target.is_dir() and not any(target.iterdir())):
                raise Ptq4ditError(f"{path} holds something else, so it is not overwritten; choose another path.")
        parent = next(folder for folder in target.parents if folder.exists())
        changed = [folder for folder in (parent, target) if folder.is_dir() or folder == parent]
        locked = [folder for folder in changed if not (folder.is_dir() and os.access(folder, os.W_OK))]
    except (OSError, RuntimeError) as error:
        raise Ptq4ditError(
            f"Cannot write {path} ({getattr(error, 'strerror', None) or error}); choose another path."
        ) from error
    if locked:
        raise Ptq4ditError(f"Cannot write {path}: {locked[0]} is not a folder that you may write to.")


def claim_target(context: typer.Context, path: Path | None, overwrite: bool, folder_with: str | None = None) -> None:
    """Checks with :func:`check_target`, and keeps other processes from writing the output until ``context``'s command ends."""

    def claimed() -> None:
        check_target(path, overwrite, folder_with)
        if path is not None:
            context.with_resource(claim(path))
            check_target(path, overwrite, folder_with)  # another run may have written it, or the claim put an old report back
            expect(path)

    processes.on_first(claimed)


def write_file(path: Path, write: Callable[[BinaryIO], object], *, overwrite: bool = False) -> Path:
    """Writes a file beside its place and moves it there when complete; returns the absolute path.

    Raises:
      Ptq4ditError: it cannot be written, or when it is complete there is a file (without ``overwrite``) or a folder.
    """
    target = path.expanduser().absolute()
    return write_whole(target, write, lambda: check_target(target, overwrite))


def write_json(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Writes a command's figures as JSON, if a path was asked for."""
    if path is not None:
        text = json.dumps(figures, indent=2) + "\n"
        write = lambda: str(write_file(path, lambda file: file.write(text.encode()), overwrite=True))
        console.print(f"Figures: {processes.on_first(write)}")
