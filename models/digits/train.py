"""Trains the digits model from a seed: ``python models/digits/train.py --out models/digits``.

The recipe is Meta's for DiT (noise prediction, learned-range variance, label dropout, exponential moving average of the
parameters), scaled down to 1797 images of 8 x 8 pixels. So small a data set invites memorizing; slightly warped copies of the
digits and weight decay keep samples from repeating it. Needs scikit-learn besides the package. All randomness comes from the
seed, but float sums differ between devices, so a retrained model equals the shipped one in quality, not in bytes.

The defaults are what made the shipped parameters: under two minutes on one NVIDIA H200, hours on a CPU (there, lower
``--steps`` and ``--batch-size``).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from scipy import ndimage

if not __package__:  # run as a script: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models import training
from models.digits.classifier import MAX_LEVEL, load_images, recognition_rate, to_levels, train_classifier
from ptq4dit_jax import checkpoints
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.sampling import sample

CONFIG = DiTConfig(
    input_size=8, patch_size=2, in_channels=1, hidden_size=128, depth=6, num_heads=4, num_classes=10, learn_sigma=True
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(training.Recipe):
    """Settings of a training run; with probability ``warp_rate`` a digit is replaced by one of its :func:`warp` variants."""

    steps: int = 20_000
    batch_size: int = 512
    warped_copies: int = 31
    warp_rate: float = 0.8


def warp(images_NHWC: np.ndarray, copies: int, rng: np.random.Generator) -> np.ndarray:
    """Each image and ``copies`` variants of it: (copies + 1, N, H, W, C), variant 0 unchanged.

    A variant is slanted and stretched a little along the rows and moved by a fraction of a pixel (cubic splines), then rounded
    to the data set's grey levels. Columns keep their height: the data set scales every digit to the image's full height.
    """
    out = np.repeat(images_NHWC[None], copies + 1, axis=0)
    center = (np.array(images_NHWC.shape[1:3]) - 1) / 2
    for variant in out[1:]:
        for image in variant:
            slant, stretch, shift = rng.normal(0, [0.08, 0.05, 0.2])
            matrix = np.array([[1.0, 0.0], [slant, np.exp(stretch)]])
            offset = center - matrix @ center + np.array([0.0, shift])
            image[..., 0] = ndimage.affine_transform(image[..., 0], matrix, offset, order=3, cval=-1.0)
    return (to_levels(out) * (2 / MAX_LEVEL) - 1).astype(np.float32)


@struct.dataclass
class WarpedDigits:
    """Training examples on the device: :func:`warp`'s images (V, N, H, W, C), of which the first are the digits themselves, and
    labels (N,). See :class:`models.training.Data`."""

    images: jax.Array
    labels: jax.Array
    warp_rate: float = struct.field(pytree_node=False)
    max_level: int = struct.field(pytree_node=False, default=MAX_LEVEL)

    def draw(self, keys_3: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        pick = jax.random.randint(keys_3[0], (count,), 0, len(self.labels), jnp.int32)
        variant = jax.random.randint(keys_3[1], (count,), 0, len(self.images), jnp.int32)
        variant = jnp.where(jax.random.uniform(keys_3[2], (count,), jnp.float32) < self.warp_rate, variant, 0)
        return self.images[variant, pick], self.labels[pick]


def train(
    recipe: Recipe,
    seed: int,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    config: DiTConfig = CONFIG,
    progress: training.Progress | None = None,
) -> FloatDiT:
    """A model trained on images (N, H, W, C) in [-1, 1] and labels (N,): the moving average of its parameters.

    ``progress`` is called with (steps done, mean losses since the last call).
    """
    variants = warp(images, recipe.warped_copies, np.random.default_rng(seed))
    data = WarpedDigits(jnp.asarray(variants), jnp.asarray(labels), warp_rate=recipe.warp_rate)
    return training.train(recipe, seed, data, config, progress=progress)[0]


def measure(model: FloatDiT, *, steps: int = 50, per_class: int = 100, cfg_scale: float = 1.5, seed: int = 1) -> float:
    """Fraction of guided DDPM samples, ``per_class`` of each digit, that the classifier recognizes; in full float32."""
    labels = np.repeat(np.arange(model.config.num_classes, dtype=np.int32), per_class)
    with jax.default_matmul_precision("highest"):
        images = sample(model, labels, key=jax.random.key(seed), steps=steps, cfg_scale=cfg_scale)
    return recognition_rate(images, labels)


def main() -> None:
    parser = argparse.ArgumentParser(description="Retrain the digits model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--batch-size", type=int, default=Recipe.batch_size)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    training.check_target(args.out)
    recipe = Recipe(steps=args.steps, batch_size=args.batch_size)

    print(f"Training {recipe} from seed {args.seed} on {jax.devices()[0].device_kind}.")
    model = train(recipe, args.seed, *load_images(), progress=training.progress_printer(recipe))
    accuracy, rate = train_classifier().held_out_accuracy, measure(model)
    print(f"Recognized: {rate:.1%} of 1000 guided samples (DDPM 50); {accuracy:.1%} of real digits held out.")

    provenance = {
        "recipe": dataclasses.asdict(recipe),
        "seed": args.seed,
        "data": "scikit-learn load_digits (1797 images)",
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "recognized_ddpm50_cfg1.5": rate,
        "classifier_held_out_accuracy": accuracy,
    }
    checkpoints.save(model, args.out, provenance=provenance, overwrite=True)
    print(f"Wrote {args.out}.")


if __name__ == "__main__":
    try:
        main()
    except Ptq4ditError as error:
        sys.exit(f"Error: {error}")
