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
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import ndimage

if not __package__:  # run as a script: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.digits.classifier import MAX_LEVEL, load_images, recognition_rate, to_levels, train_classifier
from ptq4dit_jax import checkpoints
from ptq4dit_jax.diffusion import NoiseSchedule, Sampler, StepTables
from ptq4dit_jax.dit import DiTConfig, init_params
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.sampling import sample

CONFIG = DiTConfig(
    input_size=8, patch_size=2, in_channels=1, hidden_size=128, depth=6, num_heads=4, num_classes=10, learn_sigma=True
)
SCHEDULE = NoiseSchedule()
Progress = Callable[[int, dict[str, float]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a training run; with probability ``warp_rate`` a digit is replaced by one of its :func:`warp` variants."""

    steps: int = 20_000
    batch_size: int = 512
    learning_rate: float = 1e-3
    warmup: int = 500
    weight_decay: float = 0.03
    clip_norm: float = 1.0
    label_dropout: float = 0.1
    ema_decay: float = 0.999
    warped_copies: int = 31
    warp_rate: float = 0.8

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise Ptq4ditError(f"Training {name} must be at least 1, not {getattr(self, name)}.")

    def optimizer(self) -> optax.GradientTransformation:
        warmup = min(self.warmup, self.steps // 2)
        rate = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, self.steps)
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm), optax.adamw(rate, b2=0.99, weight_decay=self.weight_decay)
        )


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


def variational_bound(x0: jax.Array, mean: jax.Array, log_var: jax.Array, true_mean: jax.Array, true_log_var: jax.Array,
                      t_B: jax.Array) -> jax.Array:  # fmt: skip
    """L_vlb of Nichol & Dhariwal in bits per pixel, (B,).

    The divergence of q(x_{t-1} | x_t, x_0) from the model's Gaussian; at t = 0 the negative log likelihood of the grey level
    under that Gaussian, integrated over the level's interval.
    """
    kl = 0.5 * (log_var - true_log_var - 1 + jnp.exp(true_log_var - log_var) + (true_mean - mean) ** 2 * jnp.exp(-log_var))

    half, inv_std = 1 / MAX_LEVEL, jnp.exp(-0.5 * log_var)
    below_top = jax.scipy.special.ndtr((x0 - mean + half) * inv_std)
    below_bottom = jax.scipy.special.ndtr((x0 - mean - half) * inv_std)
    mass = jnp.where(x0 > 1 - half, 1.0, below_top) - jnp.where(x0 < half - 1, 0.0, below_bottom)
    nll = -jnp.log(jnp.maximum(mass, 1e-12))

    pixels = tuple(range(1, x0.ndim))
    return jnp.where(t_B == 0, nll.mean(pixels), kl.mean(pixels)) / jnp.log(2.0)


def losses(
    params: Any, config: DiTConfig, tables: StepTables, x0: jax.Array, t_B: jax.Array, y_B: jax.Array, noise: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean squared error of the noise (B,) and the variational bound (B,); the latter teaches the variance only.

    ``tables`` is ancestral sampling over all timesteps, ascending in t.
    """
    row = jax.tree.map(lambda a: jnp.asarray(a)[t_B].reshape(-1, 1, 1, 1), tables)
    x_t = SCHEDULE.add_noise(x0, t_B, noise)
    eps, fraction = jnp.split(FloatDiT(params, config).apply(x_t, t_B, y_B), 2, axis=-1)
    mse = jnp.square(eps - noise).mean((1, 2, 3))

    def posterior_mean(clean: jax.Array) -> jax.Array:
        return row.from_x * x_t + row.from_x0 * clean

    predicted = jax.lax.stop_gradient(row.x0_from_x * x_t - row.x0_from_eps * eps)
    log_var = row.log_var_min + (fraction + 1) / 2 * (row.log_var_max - row.log_var_min)
    bound = variational_bound(x0, posterior_mean(predicted), log_var, posterior_mean(x0), row.log_var_min, t_B)
    return mse, bound


@partial(jax.jit, static_argnames=("config", "recipe", "count"), donate_argnames="state")
def train_steps(
    state: dict[str, Any], key: jax.Array, tables: StepTables, images: jax.Array, labels: jax.Array, first: jax.Array,
    *, config: DiTConfig, recipe: Recipe, count: int,
) -> tuple[dict[str, Any], dict[str, jax.Array]]:  # fmt: skip
    """``count`` optimizer steps from step ``first`` on, one scan; ``images`` is :func:`warp`'s result.

    Returns the new state and the mean losses.
    """
    variants, total, batch = len(images), len(labels), recipe.batch_size

    def objective(params: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        keys = jax.random.split(key, 6)
        pick = jax.random.randint(keys[0], (batch,), 0, total)
        variant = jax.random.randint(keys[1], (batch,), 0, variants)
        variant = jnp.where(jax.random.uniform(keys[2], (batch,)) < recipe.warp_rate, variant, 0)
        dropped = jax.random.uniform(keys[3], (batch,)) < recipe.label_dropout
        x0, y = images[variant, pick], jnp.where(dropped, config.null_label, labels[pick])
        t = jax.random.randint(keys[4], (batch,), 0, SCHEDULE.num_timesteps)
        mse, bound = losses(params, config, tables, x0, t, y, jax.random.normal(keys[5], x0.shape))
        means = {"mse": mse.mean(), "vlb": bound.mean()}
        return means["mse"] + means["vlb"], means

    def step(state: dict[str, Any], index: jax.Array) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        grads, means = jax.grad(objective, has_aux=True)(state["params"], jax.random.fold_in(key, index))
        updates, optimizer = recipe.optimizer().update(grads, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        # A short memory at first, so that the average does not drag the initial parameters along.
        decay = jnp.minimum(recipe.ema_decay, (1 + index) / (10 + index))
        ema = jax.tree.map(lambda old, new: new + decay * (old - new), state["ema"], params)
        return {"params": params, "optimizer": optimizer, "ema": ema}, means

    state, means = jax.lax.scan(step, state, first + jnp.arange(count))
    return state, jax.tree.map(jnp.mean, means)


def train(
    recipe: Recipe, seed: int, images: np.ndarray, labels: np.ndarray, *, config: DiTConfig = CONFIG,
    progress: Progress | None = None,
) -> FloatDiT:  # fmt: skip
    """A model trained on images (N, H, W, C) in [-1, 1] and labels (N,): the moving average of its parameters.

    ``progress`` is called with (steps done, mean losses since the last call).
    """
    init_key, key = jax.random.split(jax.random.key(seed))
    params = init_params(config, init_key)
    state = {"params": params, "optimizer": recipe.optimizer().init(params), "ema": jax.tree.map(jnp.copy, params)}
    descending = Sampler(steps=SCHEDULE.num_timesteps).tables(SCHEDULE)
    tables = jax.tree.map(lambda a: jnp.asarray(a[::-1]), descending)
    variants = jnp.asarray(warp(images, recipe.warped_copies, np.random.default_rng(seed)))
    targets = jnp.asarray(labels)
    done = 0
    while done < recipe.steps:
        count = min(100, recipe.steps - done)
        state, means = train_steps(
            state, key, tables, variants, targets, jnp.asarray(done), config=config, recipe=recipe, count=count
        )
        done += count
        if progress is not None:
            progress(done, {name: float(value) for name, value in means.items()})
    return FloatDiT(params=state["ema"], config=config, schedule=SCHEDULE)


def measure(model: FloatDiT, *, steps: int = 50, per_class: int = 100, cfg_scale: float = 1.5, seed: int = 1) -> float:
    """Fraction of guided DDPM samples, ``per_class`` of each digit, that the classifier recognizes; in full float32."""
    labels = np.repeat(np.arange(model.config.num_classes, dtype=np.int32), per_class)
    with jax.default_matmul_precision("highest"):
        images = sample(model, labels, jax.random.key(seed), steps=steps, cfg_scale=cfg_scale)
    return recognition_rate(images, labels)


def main() -> None:
    parser = argparse.ArgumentParser(description="Retrain the digits model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--batch-size", type=int, default=Recipe.batch_size)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe, start = Recipe(steps=args.steps, batch_size=args.batch_size), time.perf_counter()

    def show(done: int, means: dict[str, float]) -> None:
        figures = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        print(f"step {done:6d}/{recipe.steps}  {figures}  {time.perf_counter() - start:7.1f} s", flush=True)

    print(f"Training {recipe} from seed {args.seed} on {jax.devices()[0].device_kind}.")
    model = train(recipe, args.seed, *load_images(), progress=show)
    accuracy, rate = train_classifier().held_out_accuracy, measure(model)
    print(f"Recognized: {rate:.1%} of 1000 guided samples (DDPM 50); {accuracy:.1%} of real digits held out.")

    provenance = {
        "recipe": dataclasses.asdict(recipe), "seed": args.seed, "data": "scikit-learn load_digits (1797 images)",
        "device": jax.devices()[0].device_kind, "jax": jax.__version__,
        "recognized_ddpm50_cfg1.5": rate, "classifier_held_out_accuracy": accuracy,
    }  # fmt: skip
    checkpoints.save(model, args.out, provenance=provenance, overwrite=True)
    print(f"Wrote {args.out}.")


if __name__ == "__main__":
    try:
        main()
    except Ptq4ditError as error:
        sys.exit(f"Error: {error}")
