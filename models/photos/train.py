"""Trains the photos model from a seed: ``python models/photos/train.py --out models/photos``.

The recipe is that of the digits model (Meta's losses, label dropout, moving average of the parameters) on crops of sixteen
photographs, computed in bfloat16 with float32 parameters; their average is stored in bfloat16. All randomness comes from the
seed, but float sums differ between devices, so a retrained model equals the shipped one in quality, not in bytes.

The shipped parameters took some minutes on one NVIDIA H200 (see the card), not feasible on a CPU. Where the packages
that bring the photographs are missing, carry the crops there in a file: see :mod:`models.photos.data`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

if not __package__:  # run as a script: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models import training
from models.photos import data as photos
from models.photos.classifier import recognition_rate, train_classifier
from ptq4dit_jax import checkpoints
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.evaluation import image_grid
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.sampling import sample

CONFIG = DiTConfig(
    input_size=photos.CROP,
    patch_size=2,
    in_channels=3,
    hidden_size=288,
    depth=7,
    num_heads=4,
    num_classes=len(photos.NAMES),
    learn_sigma=True,
)
#: Timesteps at which the error of the predicted noise is measured.
TIMESTEPS = (10, 50, 100, 200, 300, 400, 500, 600, 800, 950)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(training.Recipe):
    """Settings of a training run."""

    steps: int = 9000
    batch_size: int = 256
    learning_rate: float = 6e-4
    compute_dtype: str = "bfloat16"


def train(
    recipe: Recipe,
    seed: int,
    data: photos.PhotoData,
    *,
    config: DiTConfig = CONFIG,
    progress: training.Progress | None = None,
    max_seconds: float | None = None,
) -> tuple[FloatDiT, int]:
    """A model trained on the crops to train on, and the steps taken; the moving average of its parameters, as bfloat16."""
    model, steps = training.train(recipe, seed, data.train, config, progress=progress, max_seconds=max_seconds)
    return model.astype(jnp.bfloat16), steps


@partial(jax.jit, static_argnames="count")
def _noise_errors(model: FloatDiT, bank: photos.CropBank, key: jax.Array, count: int) -> jax.Array:
    """Mean squared error of the predicted noise at every one of :data:`TIMESTEPS`, (len(TIMESTEPS),), over ``count`` crops."""

    def at(t: jax.Array) -> jax.Array:
        # The same keys for every bank: the same classes, mirrorings and noise.
        keys = jax.random.split(jax.random.fold_in(key, t), 4)
        x0, y = bank.draw(keys[:3], count)
        noise = jax.random.normal(keys[3], x0.shape, jnp.float32)
        t_B = jnp.full((count,), t)
        eps = model.apply(model.schedule.add_noise(x0, t_B, noise), t_B, y)[..., : model.config.in_channels]
        return jnp.square(eps.astype(jnp.float32) - noise).mean()

    return jax.lax.map(at, jnp.asarray(TIMESTEPS))


def noise_errors(model: FloatDiT, data: photos.PhotoData, *, crops: int = 512, seed: int = 1) -> dict[str, list[float]]:
    """Mean squared error of the noise predicted in float32, at each of :data:`TIMESTEPS`: ``train`` on crops that were trained
    on, of the sizes that the held-out squares have, and ``held_out`` on theirs."""
    exact, key = model.astype(jnp.float32), jax.random.key(seed)
    held_out = data.held_out.corners.shape[1]
    banks = {"train": data.train.fine(min(held_out, data.train.corners.shape[1] // 4)), "held_out": data.held_out}
    with jax.default_matmul_precision("highest"):
        return {name: np.asarray(_noise_errors(exact, bank, key, crops)).tolist() for name, bank in banks.items()}


def draw_samples(
    model: FloatDiT, *, per_class: int, steps: int = 50, cfg_scale: float = 1.5, seed: int = 1, batch_size: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """Guided DDPM samples computed in float32, class after class: images (N, 32, 32, 3) and labels (N,)."""
    labels = np.repeat(np.arange(model.config.num_classes, dtype=np.int32), per_class)
    with jax.default_matmul_precision("highest"):
        images = sample(
            model.astype(jnp.float32), labels, key=jax.random.key(seed), steps=steps, cfg_scale=cfg_scale, batch_size=batch_size
        )
    return images, labels


def measure(model: FloatDiT, data: photos.PhotoData, picture: Path, *, per_class: int = 64, steps: int = 50) -> dict[str, Any]:
    """Figures of a trained model; ``picture`` gets six samples of each class, a column per class."""
    images, labels = draw_samples(model, per_class=per_class, steps=steps)
    shown = images.reshape(model.config.num_classes, per_class, *images.shape[1:])[:, :6]
    picture.parent.mkdir(parents=True, exist_ok=True)
    grid = shown.swapaxes(0, 1).reshape(-1, *images.shape[1:])
    image_grid(grid, columns=model.config.num_classes).save(picture)
    errors = noise_errors(model, data)
    judge = train_classifier(data)
    predicted = judge.predict(np.nan_to_num(images, nan=-1.0))
    by_class = {name: float(np.mean(predicted[labels == label] == label)) for label, name in enumerate(photos.NAMES)}
    return {
        "samples": len(labels),
        f"recognized_ddpm{steps}_cfg1.5": recognition_rate(images, labels, judge),
        "classifier_held_out_accuracy": judge.held_out_accuracy,
        "recognized_by_class": by_class,
        "noise_mse": {name: float(np.mean(values)) for name, values in errors.items()},
        "noise_mse_by_timestep": {"t": list(TIMESTEPS), **errors},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Retrain the photos model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--batch-size", type=int, default=Recipe.batch_size)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-seconds", type=float, help="end training early, with a cooldown, where it would take longer")
    parser.add_argument("--data", type=Path, help="crops written by models.photos.data; made from the packages otherwise")
    parser.add_argument("--picture", type=Path, help="PNG of samples; default: samples.png in the folder")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    training.check_target(args.out)
    recipe = Recipe(steps=args.steps, batch_size=args.batch_size, learning_rate=args.learning_rate)
    data = photos.build() if args.data is None else photos.load(args.data)

    device = jax.devices()[0].device_kind
    print(f"Training {recipe} from seed {args.seed} on {device}.", flush=True)
    progress = training.progress_printer(recipe, every=200)
    model, steps = train(recipe, args.seed, data, progress=progress, max_seconds=args.max_seconds)
    facts = {
        "recipe": dataclasses.asdict(recipe),
        "steps": steps,
        "seed": args.seed,
        "device": device,
        "jax": jax.__version__,
        "data": f"crops of {len(photos.NAMES)} photographs from scikit-image and scikit-learn",
        "classes": list(photos.NAMES),
    }
    # Saved before anything is measured, so that no fault of the measurement costs the training.
    checkpoints.save(model, args.out, provenance=facts, overwrite=True)
    print(f"Wrote {args.out} after {steps} steps: {model.num_params / 1e6:.2f} M parameters.", flush=True)

    figures = measure(model, data, args.picture or args.out / "samples.png")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**facts, **figures}, indent=1) + "\n")
    rate = next(value for name, value in figures.items() if name.startswith("recognized_ddpm"))
    mse = figures["noise_mse"]
    print(
        f"Recognized: {rate:.1%} of {figures['samples']} guided samples (DDPM 50); "
        f"{figures['classifier_held_out_accuracy']:.1%} of held-out crops."
    )
    print(f"Squared error of the noise: {mse['train']:.4f} on crops trained on, {mse['held_out']:.4f} on held-out ones.")
    checkpoints.save(model, args.out, provenance={**facts, **figures}, overwrite=True)


if __name__ == "__main__":
    try:
        main()
    except Ptq4ditError as error:
        sys.exit(f"Error: {error}")
