"""Whether the number of devices changes what `quantize` makes: 18 small odd models on 1, 2, 4 and 8 virtual CPU devices.

    python -m benchmarks.device_independence

Each number of devices is a process of its own, since threads are shared out when JAX starts. Every leaf of the quantized models
is compared bit by bit with that of one device: codes, zero points, scales and biases. A line for each comparison; exit
status 1 where anything differs. `--row-batch` compares other row batches on one device too. How far samples of the float and of
the quantized model are apart is shown besides; of these no bits are promised.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import ptq4dit_jax as ptq
from benchmarks import common
from ptq4dit_jax import sharding
from ptq4dit_jax.config import Reconstruction
from ptq4dit_jax.networks.dit import DiTConfig

ITERATIONS = 40


@dataclasses.dataclass(frozen=True)
class Case:
    """One model, how it is quantized, and the seed of both."""

    shape: dict[str, Any]
    settings: dict[str, Any]
    seed: int

    @property
    def name(self) -> str:
        s, q = self.shape, self.settings
        rounding = f"reconstructed from {q['reconstruction'].start}" if "reconstruction" in q else q["rounding"]
        return (
            f"{s['hidden_size']} wide, {s['num_heads']} heads, depth {s['depth']}, {s['input_size']}/{s['patch_size']} x "
            f"{s['in_channels']}, {s['num_classes']} classes{'' if s['null_class'] else ' no null'}, W{q['weight_bits']}, "
            f"{q['calib_rows']} rows, seed {self.seed}, {q['balance']}, {rounding}"
        )


def cases() -> list[Case]:
    """18 models: each value of each setting in several, no two alike."""
    made = []
    for i in range(18):
        patch = (1, 2, 4)[i % 3]
        classes = (5, 5, 0)[(i // 2) % 3]
        shape = {
            "input_size": {1: (4, 5), 2: (8, 6), 4: (8, 4)}[patch][i % 2],
            "patch_size": patch,
            "in_channels": 1 + i % 4,
            "hidden_size": (20, 24, 32, 48)[(i // 2) % 4],
            "num_heads": (1, 2, 4)[(i // 3) % 3],
            "depth": 1 + (i // 2) % 3,
            "num_classes": classes,
            "null_class": classes > 0 and i % 4 != 1,
            "learn_sigma": i % 2 == 0,
            "frequency_size": 16,
        }
        settings: dict[str, Any] = {
            "weight_bits": (8, 4)[i % 2],
            "calib_steps": 2 + i % 3,
            "steps": 5,
            "calib_rows": (16, 24, 12, 4, 20, 22)[(i // 2) % 6],
            "policy": ("edges8-float", "uniform")[(i // 4) % 2],
            "balance": ("search", "csb+ssc")[i % 2],
        }
        if i % 3 == 1:
            settings |= {"balance": "csb+ssc", "ssc": "rows"}
        if i % 9 in (0, 2, 4, 5, 7):
            settings["reconstruction"] = Reconstruction(
                iterations=ITERATIONS, batch_size=(8, 16, 32)[i % 3], start=("nearest", "gptq")[i // 9]
            )
        else:
            settings["rounding"] = "gptq" if i % 9 in (3, 8) else "nearest"
        made.append(Case(shape, settings, seed=i % 5))
    return made


def outcome(case: Case, row_batch: int | None, samples: bool = True) -> dict[str, np.ndarray]:
    """Every leaf of the quantized model on all devices of this process, and ``samples`` of both models."""
    model = ptq.FloatDiT.init(DiTConfig(**case.shape), key=jax.random.key(100 + case.seed))
    mesh = sharding.data_mesh() if jax.device_count() > 1 else None
    key = jax.random.key(case.seed)
    quantized = ptq.quantize(model, ptq.QuantConfig.of(**case.settings), key=key, row_batch=row_batch, mesh=mesh)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(quantized))
    found = {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}
    labels = np.arange(11) % case.shape["num_classes"] if case.shape["num_classes"] else 11
    for name, sampled in (("float", model), ("quantized", quantized)) if samples else ():
        found[f"samples/{name}"] = ptq.sample(sampled, labels, key=key, steps=5, mesh=mesh)
    return found


def in_a_process(
    devices: int, row_batch: int | None, chosen: list[int], folder: Path, *, samples: bool = True
) -> list[dict[str, np.ndarray]]:
    """:func:`outcome` of the chosen cases on so many virtual devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    path = folder / f"{devices}-{row_batch}"
    path.mkdir()
    command = [sys.executable, "-m", "benchmarks.device_independence", "--worker", str(path), "--cases", *map(str, chosen)]
    command += [] if row_batch is None else ["--row-batch", str(row_batch)]
    command += [] if samples else ["--no-samples"]
    subprocess.run(command, check=True, cwd=common.ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags})
    return [dict(np.load(path / f"{index}.npz")) for index in chosen]


def differing(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> list[str]:
    """What differs, samples aside, with how many of how many values."""
    assert one.keys() == other.keys()
    told = []
    for name, array in one.items():
        if not name.startswith("samples/") and array.tobytes() != other[name].tobytes():
            told.append(f"{name} ({int((array != other[name]).sum())} of {array.size}, {array.dtype})")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4, 8], help="compared with one device")
    parser.add_argument("--row-batch", type=int, nargs="*", default=[], help="compared with the default, on one device")
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(18)), help="by number, 0 to 17")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--no-samples", action="store_true", help="do not sample from the models")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    chosen = cases()
    if arguments.worker is not None:
        for index in arguments.cases:
            leaves = outcome(chosen[index], next(iter(arguments.row_batch), None), not arguments.no_samples)
            np.savez(arguments.worker / f"{index}.npz", **leaves)  # type: ignore[arg-type]
            jax.clear_caches()  # compiled programs hold memory maps, of which a process may have 65,530
        return
    wanted: list[tuple[int, int | None]] = [(devices, None) for devices in arguments.devices]
    wanted += [(1, rows) for rows in arguments.row_batch]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as jobs:
        started = partial(in_a_process, chosen=arguments.cases, folder=Path(folder), samples=not arguments.no_samples)
        runs = [(1, None), *wanted]
        one, *rest = jobs.map(lambda run: started(*run), runs)
        others = dict(zip(wanted, rest, strict=True))
    bad = 0
    for place, index in enumerate(arguments.cases):
        print(f"{index:2} {chosen[index].name}")
        for (devices, rows), found in others.items():
            told = differing(one[place], found[place])
            bad += bool(told)
            what = f"{devices} devices" if rows is None else f"row batch {rows}"
            apart = [
                f"{name.removeprefix('samples/')} samples {np.abs(one[place][name] - found[place][name]).max():.1e} apart"
                for name in one[place]
                if name.startswith("samples/")
            ]
            print(f"   {what:12} {'; '.join([', '.join(told) or 'the same', *apart])}")
    total = len(arguments.cases) * len(others)
    print(f"{total - bad} of {total} the same")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
