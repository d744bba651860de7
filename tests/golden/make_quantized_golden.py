"""Makes the quantized models of tests/golden/quantized, or compares with them.

    PYTHONPATH=tests python tests/golden/make_quantized_golden.py --check

They show the program as it was when they were made. A later one must load them, sample the same images, and quantize the same
float model to the same integers. --check writes nothing; it compares bytes, which are the same on one kind of CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import numpy as np
from helpers import load_quantized, tiny_model

import ptq4dit_jax as ptq

FOLDER = Path(__file__).parent / "quantized"
#: By the name of its folder, how each was quantized.
MODELS = {
    "w8a8": ptq.QuantConfig.of(steps=8, calib_steps=4, calib_rows=8, step_groups=2),
    "w4a8": ptq.QuantConfig.of(steps=8, calib_steps=4, calib_rows=8, step_groups=2, weight_bits=4),
}


def quantized(name: str) -> ptq.QuantizedDiT:
    return ptq.quantize(tiny_model(), MODELS[name], key=jax.random.key(0), keep_poor=True)


def samples(model: ptq.QuantizedDiT) -> np.ndarray:
    """Six guided images (6, 6, 6, 3) float32 in eight steps."""
    return np.asarray(ptq.sample(model, labels=np.arange(6) % 5, key=jax.random.key(1), steps=8, cfg_scale=1.5))


def integers(model: ptq.QuantizedDiT) -> dict[str, np.ndarray]:
    """The codes of every layer."""
    return {name: np.asarray(layer.stored.codes()) for name, layer in model.linears.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the stored models instead of making them")
    check = parser.parse_args().check
    if not check:
        for name in MODELS:
            ptq.save(quantized(name), FOLDER / name)
        made = {name: samples(load_quantized(FOLDER / name)) for name in MODELS}
        np.savez_compressed(FOLDER / "samples.npz", allow_pickle=True, **made)
        return
    stored = np.load(FOLDER / "samples.npz")
    for name in MODELS:
        loaded, again = load_quantized(FOLDER / name), quantized(name)
        same = np.array_equal(samples(loaded), stored[name])
        moved = sum(int((codes != integers(again)[layer]).sum()) for layer, codes in integers(loaded).items())
        print(f"{name}: samples {'the same bytes' if same else 'DIFFER'}; {moved} codes differ when quantized again")


if __name__ == "__main__":
    main()
