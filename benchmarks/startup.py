"""How long a command takes to its first image: compiling everything, with a folder of compiled programs, and exported.

    JAX_PLATFORMS=cpu python -m benchmarks.startup --hardware "2 CPU cores"

Every command is a process of its own that samples one image. Where others use the machine too, wall time varies, so CPU
time is measured as well. Of ``--repeat`` runs, the one with the least CPU time counts. Writes
benchmarks/results/startup.json and the table in docs/programs.md.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import ptq4dit_jax as ptq
from benchmarks import aot, common
from ptq4dit_jax.config import QuantConfig
from ptq4dit_jax.networks.dit import DiTConfig

RESULTS = common.RESULTS / "startup.json"
PAGE = common.ROOT / "docs" / "programs.md"
DIGITS = common.ROOT / "models" / "digits"
#: A network that computes next to nothing.
TINY = DiTConfig(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=4, num_classes=10)
SAMPLING = ("--steps", "50")
#: Platforms and widths of weights for which programs are exported.
PROGRAMS = (("h200", 8), ("h200", 4), ("v5e", 8))
#: The columns of the table by their keys.
COLUMNS = {
    "anew": "everything compiled",
    "kept": "programs kept",
    "exported": "exported, programs kept",
}


class Run(NamedTuple):
    """Seconds of a process."""

    wall: float
    cpu: float


def run(caches: Path, *arguments: str | Path) -> Run:
    """Runs one command in a process of its own, which keeps programs below ``caches``."""
    told = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    environment = {name: value for name, value in os.environ.items() if name not in told}
    environment |= {"XDG_CACHE_HOME": str(caches), "PYTHONPATH": str(common.ROOT)}
    command = [sys.executable, "-m", "ptq4dit_jax.cli", *map(str, arguments)]
    started = time.perf_counter()
    nowhere = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    child = os.posix_spawn(sys.executable, command, environment, file_actions=nowhere)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"Error: ptq4dit {' '.join(map(str, arguments))} failed.")
    return Run(time.perf_counter() - started, usage.ru_utime + usage.ru_stime)


def best(runs: list[Run]) -> dict[str, float]:
    """The run of least CPU time."""
    return min(runs, key=lambda one: one.cpu)._asdict()


def size_of(folder: Path) -> dict[str, int]:
    """How many programs a folder of them holds, and their bytes."""
    sizes = [path.stat().st_size for path in folder.glob("ptq4dit_jax/programs/*-cache")]
    return {"programs": len(sizes), "bytes": sum(sizes)}


def measure(model: Path, folder: Path, repeat: int) -> dict[str, Any]:
    """Seconds to the first image of a model, for each column, and what is kept after it."""
    sample = ("sample", model, "--labels", "0", "--overwrite", "--out", folder / "a.npz")
    anew = [run(folder / f"anew{number}", *sample, *SAMPLING) for number in range(repeat)]
    kept = [run(folder / "anew0", *sample, *SAMPLING) for _ in range(repeat)]
    program = folder / "program"
    run(folder / "exported", "compile", model, *SAMPLING, "--batch-size", "1", "--overwrite", "--out", program)
    run(folder / "exported", *sample, "--program", program)
    exported = [run(folder / "exported", *sample, "--program", program) for _ in range(repeat)]
    found = {"anew": best(anew), "kept": best(kept), "exported": best(exported)}
    return {"seconds": found, "kept": size_of(folder / "anew0"), "program_bytes": program.stat().st_size}


def lowered(platform: str, bits: int, path: Path) -> dict[str, float]:
    """Seconds of CPU time until XLA could compile the sampler of a DiT-XL/2 for a device that need not be here: traced, and
    read from a file. Its arrays have shapes and no values. Pallas, which kernels are written in, is imported beforehand."""
    model = aot.quantized_model(DiTConfig.preset("DiT-XL/2"), QuantConfig.of(weight_bits=bits), "bfloat16")
    importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    importlib.import_module("jax.experimental.pallas.tpu")
    started = time.process_time()
    ptq.save_sampler(ptq.export_sampler(model, 64, platform=platform, steps=50), path, overwrite=True)
    traced = time.process_time()
    program = ptq.load_sampler(path)
    arrays = [jax.ShapeDtypeStruct(array.shape, np.dtype(array.dtype)) for array in program.form.arrays]
    jax_platform = "cuda" if program.kind.platform == "gpu" else program.kind.platform
    program._jitted.trace(*arrays).lower(lowering_platforms=(jax_platform,))
    return {"traced": traced - started, "read": time.process_time() - traced}


def table(document: dict[str, Any]) -> str:
    """The table in Markdown."""
    heads = ["seconds of CPU time (wall) to the first image", *COLUMNS.values(), "kept", "exported sampler"]
    lines = [f"{common.source(document)}; 50 steps, one image, best of {document['repeat']}.", ""]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    base = f"{document['imports']['cpu']:.1f} ({document['imports']['wall']:.1f})"
    lines.append(f"| no model, imports alone | {' | '.join([base] * len(COLUMNS))} | | |")
    for model, found in document["models"].items():
        seconds = [f"{found['seconds'][key]['cpu']:.1f} ({found['seconds'][key]['wall']:.1f})" for key in COLUMNS]
        kept = f"{found['kept']['programs']} programs, {found['kept']['bytes'] / 1e6:.1f} MB"
        lines.append(f"| {model} | {' | '.join(seconds)} | {kept} | {found['program_bytes'] / 1e6:.2f} MB |")
    lines += ["", "Until XLA can begin to compile, DiT-XL/2, 64 images (the device was not there):", ""]
    lines += ["| sampler | traced and exported, seconds of CPU time | read from the file |", "|---|---|---|"]
    for words, found in document["lowered"].items():
        lines.append(f"| {words} | {found['traced']:.2f} | {found['read']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0], RESULTS)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ptq.save(ptq.FloatDiT.init(TINY, key=jax.random.key(0)), folder / "tiny")
        fast = "--weight-bits 4 --rounding nearest --balance csb+ssc --calib-steps 2 --calib-rows 4".split()
        run(folder / "quantizing", "quantize", DIGITS, *fast, *SAMPLING, "--out", folder / "digits-w4a8")
        models = {
            "a float DiT of width 32": folder / "tiny",
            "models/digits, float": DIGITS,
            "models/digits, W4A8": folder / "digits-w4a8",
        }
        imports = best([run(folder, "--help") for _ in range(arguments.repeat)])
        found = {}
        for words, model in models.items():
            with tempfile.TemporaryDirectory(dir=folder) as own:
                found[words] = measure(model, Path(own), arguments.repeat)
            print(f"{words}: {json.dumps(found[words])}", flush=True)
        programs = {f"W{bits}A8, {platform}": lowered(platform, bits, folder / "p") for platform, bits in PROGRAMS}
    document = {**common.header(arguments), "repeat": arguments.repeat, "imports": imports, "models": found}
    document["lowered"] = programs
    common.write(document, arguments.out)
    common.put_table(PAGE, "startup.py", table(document))


if __name__ == "__main__":
    main()
