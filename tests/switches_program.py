"""Prints digests of integers, scales, noise and samples as JSON: run by ``test_switches.py`` in processes of their own."""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import helpers
import jax
import numpy as np

import ptq4dit_jax as ptq
from ptq4dit_jax.config import QuantConfig, Reconstruction
from ptq4dit_jax.diffusion import Sampling
from ptq4dit_jax.evaluation import plain


def digest(tree) -> str:
    """Of names, types, shapes and bytes."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return sha.hexdigest()


def main() -> None:
    key, labels = jax.random.key(3), np.array([0, 2, 4])
    model = helpers.tiny_model(depth=1, hidden_size=16, num_heads=2)
    rows = ptq.sample_trajectories(model, ptq.Calibration(steps=2, rows=4, sampling=Sampling(steps=3)), key=key)
    found = {
        "parameters": digest(ptq.FloatDiT.init(model.config, key=key).params),
        "calibration rows": digest(rows),
        "samples of the float model": digest(ptq.sample(model, labels, key=key, steps=2)),
    }
    chain = {"calib_steps": 2, "calib_rows": 4, "steps": 3}
    learned = Reconstruction(iterations=3, batch_size=8, row_weights="steps")
    for name, config in {
        "W4A8": QuantConfig.of(**helpers.PLAIN, weight_bits=4, **chain),
        "the paper's W8A8": QuantConfig.paper(8, ssc="rows", **chain),
        "learned from closed form": QuantConfig.of(
            weight_bits=4, range_search="percentile", dynamic_sites=(), balance="csb+ssc", reconstruction=learned, **chain
        ),
    }.items():
        quantized = ptq.quantize(model, config, key=key)
        with tempfile.TemporaryDirectory() as folder:
            quantized = helpers.load_quantized(ptq.save(quantized, Path(folder) / "model"))
        found[name] = digest(quantized)
        found[f"facts of {name}"] = quantized.provenance.facts["calibration"]["rows"]
        found[f"samples of {name}"] = digest(ptq.sample(quantized, labels, key=key, steps=2))
    comparison = ptq.compare(model, {"learned": quantized}, labels=labels, key=key, sampling=Sampling(steps=2))
    found["evaluation"] = digest(np.array([comparison.figures["learned"].psnr_db]))
    json.dumps(plain(comparison.to_json()), allow_nan=False)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
