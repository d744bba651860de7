"""Every notebook runs from the first cell to the last, and what is stored in it is what a reader elsewhere may see."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import jax
import nbformat
import numpy as np
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS_PER_CELL = 600
#: Notebooks that compute longer than they compile, so they are compiled as users do, whatever tests/conftest.py says.
COMPUTING = {"02_tpu_pod"}
#: What differs between two runs or machines: seconds, and hashes of arrays, in which the last bit of every scale counts.
VARYING = re.compile(r"[\d.]+ s\b|\b[0-9a-f]{16}\b")
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def figures(notebook: Any) -> list[np.ndarray]:
    """The pictures among the outputs, decoded."""
    data = [output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(d["image/png"])))) for d in data if "image/png" in d]


def assert_shows_figures(notebook: Any) -> None:
    shown = figures(notebook)
    assert shown, "no figure was displayed"
    assert all(np.ptp(figure[..., :3]) > 0 for figure in shown), "a figure is blank"


def printed(notebook: Any) -> str:
    """What the cells print, without what varies."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs if output.output_type == "stream"]
    return " ".join(VARYING.sub("*", "".join(output.text for output in outputs)).split())


def assert_agree(stored: str, run: str) -> None:
    """The same words, and numbers within one percent; what is nearly zero is zero."""
    assert NUMBER.sub("#", stored) == NUMBER.sub("#", run)
    numbers = [np.array(NUMBER.findall(text), float) for text in (stored, run)]
    assert numbers[0].size, "nothing that was measured is printed"
    np.testing.assert_allclose(numbers[1], numbers[0], rtol=0.01, atol=1e-6)


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_what_was_printed_is_compared():
    def of(*texts: str) -> str:
        streams = [nbformat.v4.new_output("stream", name="stdout", text=text) for text in texts]
        return printed(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=streams)]))

    stored = of("W4A8 33.9 dB, 0123456789abcdef, 12.1 s\n", "change 2e-07\n")
    assert_agree(stored, of("W4A8 33.8 dB, fedcba9876543210,  9.5 s\nchange 1e-07\n"))
    for other in ("W4A8 33.5 dB, *, * change 2e-07", "W4A6 33.9 dB, *, * change 2e-07", "W4A8 33.9 %, *, * change 2e-07"):
        with pytest.raises(AssertionError):
            assert_agree(stored, other)


@pytest.mark.slow
@each_notebook
def test_runs_without_error_and_gives_what_is_stored(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # A kernel of this interpreter, whatever kernels and settings the user has.
    write_kernel_spec(tmp_path / "kernels" / "python3")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # the eight virtual devices are this process's alone

    if path.stem in COMPUTING:
        monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)

    notebook = nbformat.read(path, as_version=4)
    stored = printed(notebook)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook, timeout=SECONDS_PER_CELL, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()  # raises what the first failing cell raised
    assert all(cell.execution_count for cell in code_cells(notebook))
    assert_shows_figures(notebook)
    if jax.default_backend() == "cpu":  # where the outputs were stored; on GPUs other layers are integers
        assert_agree(stored, printed(notebook))


@each_notebook
def test_stored_outputs_are_complete_and_portable(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "not executed once, in order"
    assert all(not cell.metadata for cell in cells), "cells carry metadata of the run"
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert_shows_figures(notebook)
    text = "\n".join(str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", "")) for output in outputs)
    assert not re.search(r"(?<![\w.])(/(home|root|tmp|usr|work|Users)/|[A-Z]:\\)", text), "a path of the machine it ran on"
    assert path.stat().st_size < 600_000
