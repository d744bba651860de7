"""Compares the decoder with diffusers' `AutoencoderKL` at Stable Diffusion's true size, random weights; run by hand.

    python tests/golden/compare_vae.py

Needs torch and diffusers beside this package. Goes through a folder that diffusers saves, once as safetensors and once as .bin.
Prints the largest difference over the largest value for latents of 256 px and 512 px, and fails above 1e-4.
"""

import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from make_vae_golden import TRUE, decode, random_vae

from ptq4dit_jax.checkpoints.foreign.vaes import load_vae
from ptq4dit_jax.vae import VAEDecoder


def main() -> None:
    theirs = random_vae(1, **TRUE)
    worst = 0.0
    for safetensors, side in ((True, 32), (False, 64)):
        latents = np.random.default_rng(side).standard_normal((1, 4, side, side), np.float32)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(Path(folder), safe_serialization=safetensors)
            ours = load_vae(folder)
        started = time.perf_counter()
        expected = decode(theirs, latents).transpose(0, 2, 3, 1)
        between = time.perf_counter()
        images = np.asarray(jax.jit(VAEDecoder.decode)(ours, latents.transpose(0, 2, 3, 1)))
        seconds = f"diffusers {between - started:.1f} s, here {time.perf_counter() - between:.1f} s with compilation"
        difference = float(abs(images - expected).max() / abs(expected).max())
        print(f"{side}x{side} latents: {difference:.2e} (largest value {abs(expected).max():.2f}); {seconds}")
        worst = max(worst, difference)
    if worst > 1e-4:
        raise SystemExit("The decoder differs from diffusers'.")


if __name__ == "__main__":
    main()
