"""Writes `vae/`, a narrow VAE with random weights in diffusers' own layout, and `vae.npz`, latents and their pictures.

    python tests/golden/make_vae_golden.py

Needs torch and diffusers (made with torch 2.13.0 on CPU and diffusers 0.42.1), which the tests do not. Everything is
float32 and seeded.

vae/config.json, vae/diffusion_pytorch_model.safetensors: `AutoencoderKL` as `save_pretrained` writes it, with the encoder.
Four levels whose width changes at the same two as Stable Diffusion's, with one layer per block instead of two. Norms and
biases are random too, and attention is far from uniform, so that every parameter matters.

vae.npz:

    latents (2,4,6,10)     NCHW, of standard deviation 1, scaled as a diffusion model makes them
    images (2,3,48,80)     `decode(latents / scaling_factor)`, NCHW, not clipped
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

HERE = Path(__file__).resolve().parent
NARROW = {"block_out_channels": (4, 8, 12, 12), "layers_per_block": 1, "norm_num_groups": 2}
TRUE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}


def random_vae(seed: int, **shape: object) -> AutoencoderKL:
    """Stable Diffusion's architecture in some width, with random parameters all of which matter."""
    torch.manual_seed(seed)
    types = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = AutoencoderKL(**types, latent_channels=4, **shape)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if parameter.ndim == 1:
                offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(offset + 0.2 * torch.randn_like(parameter))
            elif "to_q" in name or "to_k" in name:
                parameter.mul_(3)
    return vae.eval()


def decode(vae: AutoencoderKL, latents: np.ndarray) -> np.ndarray:
    """Images (B, 3, H, W) of latents (B, C, h, w), as diffusers' pipelines decode them."""
    with torch.no_grad():
        return vae.decode(torch.from_numpy(latents) / vae.config.scaling_factor).sample.numpy()


def main() -> None:
    vae = random_vae(0, **NARROW)
    latents = np.random.default_rng(0).standard_normal((2, 4, 6, 10), np.float32)
    images = decode(vae, latents)
    vae.save_pretrained(HERE / "vae")
    np.savez_compressed(HERE / "vae.npz", latents=latents, images=images)
    print(f"images: mean {images.mean():.3f}, standard deviation {images.std():.3f}, largest {abs(images).max():.3f}")


if __name__ == "__main__":
    main()
