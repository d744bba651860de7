"""Sampling images from a float or quantized model: micro-batches, meshes, and deterministic noise."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from ptq4dit_jax import sharding
from ptq4dit_jax.diffusion import Network, Sampler, SamplerName, StepTables, denoise, guided_apply, sample_keys, sample_noise
from ptq4dit_jax.dit import DiTConfig, GuidedChannels
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.numerics import threefry
from ptq4dit_jax.vae import VAEDecoder

Progress = Callable[[int, int], None]


@partial(jax.jit, static_argnames=("stochastic", "learned_variance", "guided", "channels", "num_kept", "mesh"))
def sample_batch(
    model: Any,
    tables: StepTables,
    key: jax.Array,
    indices_B: jax.Array,
    labels_B: jax.Array,
    cfg_scale: jax.Array,
    noise: jax.Array | None,
    step_noise: jax.Array | None,
    keep_slots: jax.Array | None,
    decoder: VAEDecoder | None = None,
    *,
    stochastic: bool,
    learned_variance: bool,
    guided: bool,
    channels: GuidedChannels,
    num_kept: int,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One compiled program from noise to images: (B, H, W, C) and the kept step inputs (num_kept, B, H, W, C).

    With a decoder the images are the pictures that it makes of the latents; the step inputs remain latents.

    With a mesh every device runs the program of a single device on its share of the batch (``shard_map``). Left to the
    partitioner, the same chain is fused differently, rounds differently in the last bit, and a quantizer turns that into
    another code.
    """

    def chain(
        model: Any,
        tables: StepTables,
        key: jax.Array,
        indices_B: jax.Array,
        labels_B: jax.Array,
        cfg_scale: jax.Array,
        noise: jax.Array | None,
        step_noise: jax.Array | None,
        keep_slots: jax.Array | None,
        decoder: VAEDecoder | None,
    ) -> tuple[jax.Array, jax.Array]:
        shape = model.config.image_shape
        keys_B = sample_keys(key, indices_B)
        x_T = sample_noise(keys_B, 0, shape) if noise is None else noise

        def predict(x: jax.Array, t: jax.Array) -> jax.Array:
            t_1 = t[None]
            if guided:
                return guided_apply(model, x, t_1, labels_B, cfg_scale, channels)
            return model.apply(x, t_1, labels_B)

        def draw(step: jax.Array) -> jax.Array:
            return sample_noise(keys_B, step + 1, shape) if step_noise is None else step_noise[step]

        x, inputs = denoise(
            predict, tables, x_T, draw if stochastic else None,
            learned_variance=learned_variance, keep_slots=keep_slots, num_kept=num_kept,
        )  # fmt: skip
        return x if decoder is None else decoder.decode(x), inputs

    if mesh is not None:
        whole, rows, rows_of_steps = PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "data")
        chain = jax.shard_map(
            chain, mesh=mesh, in_specs=(whole, whole, whole, rows, rows, whole, rows, rows_of_steps, whole, whole),
            out_specs=(rows, rows_of_steps), check_vma=False,
        )  # fmt: skip
    return chain(model, tables, key, indices_B, labels_B, cfg_scale, noise, step_noise, keep_slots, decoder)


def check_labels(labels: ArrayLike, config: DiTConfig) -> np.ndarray:
    """Labels as (N,) int32, or an error that names the first one out of range."""
    array = np.atleast_1d(np.asarray(labels))
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise Ptq4ditError(f"Labels must be a non-empty list of integers, not {labels!r}.")
    top = config.num_classes - 1 + config.null_class
    wrong = array[(array < 0) | (array > top)]
    if wrong.size:
        null = f" ({top} is the null class)" if config.null_class else ""
        raise Ptq4ditError(f"Label {wrong[0]} is out of range; this model has classes 0 to {config.num_classes - 1}{null}.")
    return array.astype(np.int32)


def _check_noise(name: str, array: ArrayLike | None, shape: tuple[int, ...]) -> np.ndarray | None:
    if array is None:
        return None
    given = np.asarray(array, np.float32)
    if given.shape != shape:
        raise Ptq4ditError(f"{name} must have shape {shape}, not {given.shape}.")
    if not np.isfinite(given).all():
        raise Ptq4ditError(f"{name} contains NaN or infinity.")
    return given


def _pad(array: Any, size: int, axis: int = 0) -> Any:
    """Repeats the last row along ``axis`` up to ``size``, so that every micro-batch has one shape."""
    missing = size - array.shape[axis]
    return np.concatenate([array, np.repeat(np.take(array, [-1], axis), missing, axis)], axis) if missing else array


def sample(
    model: Network,
    labels: ArrayLike,
    key: jax.Array,
    *,
    steps: int | str = 50,
    sampler: SamplerName = "auto",
    eta: float = 0.0,
    cfg_scale: float = 1.5,
    cfg_channels: GuidedChannels = "first3",
    batch_size: int | None = None,
    noise: ArrayLike | None = None,
    step_noise: ArrayLike | None = None,
    decoder: VAEDecoder | None = None,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """Samples one image (or latent) per label.

    Args:
      model: a :class:`FloatDiT` or :class:`QuantizedDiT`.
      labels: (N,) class labels.
      key: the seed; sample ``i`` sees noise made of the key and ``i`` alone, whatever the batch size or the devices.
      steps: sampler steps, a count or a respacing string such as "ddim50".
      sampler: "ddpm" (ancestral, learned variance where the model has one), "ddim" or "dpm++2m" for a model that predicts
        noise; "euler" or "heun" for one that predicts velocity; "auto" is the first of those that fit.
      eta: noise of DDIM, 0 to 1.
      cfg_scale: classifier-free guidance; 1 turns it off and halves the work.
      cfg_channels: guide the "first3" channels as Meta's code does, or "all".
      batch_size: images per compiled call (all at once by default); the last batch is padded.
      noise: initial noise (N, H, W, C) instead of the key's.
      step_noise: per-step noise (S, N, H, W, C) for stochastic samplers instead of the key's.
      decoder: makes pictures of the latents, within the same compiled program.
      mesh: shards each batch over the mesh's ``data`` axis.
      progress: called with (images done, images in all) after each batch.

    Returns:
      (N, H, W, C) float32, on the host, in the range that the model was trained on; with a decoder its pictures, in [-1, 1] but
      for what overshoots.
    """
    walk = Sampler(name=sampler, steps=steps, eta=eta)
    images, _ = run_chain(
        model, labels, key, walk, cfg_scale=cfg_scale, cfg_channels=cfg_channels, batch_size=batch_size,
        noise=noise, step_noise=step_noise, decoder=decoder, mesh=mesh, progress=progress,
    )  # fmt: skip
    return images


def run_chain(
    model: Network,
    labels: ArrayLike,
    key: jax.Array,
    walk: Sampler,
    *,
    cfg_scale: float,
    cfg_channels: GuidedChannels = "first3",
    batch_size: int | None = None,
    noise: ArrayLike | None = None,
    step_noise: ArrayLike | None = None,
    decoder: VAEDecoder | None = None,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
    keep_steps: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """:func:`sample`, returning besides the images the inputs of the steps ``keep_steps`` (positions in the chain, noisiest 0):
    (len(keep_steps), N, H, W, C)."""
    config, walk = model.config, walk.resolve(model.schedule)
    labels_N = check_labels(labels, config)
    total, shape = len(labels_N), config.image_shape
    tables = walk.tables(model.schedule)
    noise = _check_noise("noise", noise, (total, *shape))
    step_noise = _check_noise("step_noise", step_noise, (tables.num_steps, total, *shape))
    if not np.isfinite(cfg_scale):
        raise Ptq4ditError(f"cfg_scale must be a finite number, not {cfg_scale}.")
    if cfg_channels not in get_args(GuidedChannels):
        raise Ptq4ditError(f"cfg_channels must be one of {', '.join(get_args(GuidedChannels))}, not {cfg_channels!r}.")
    guided = cfg_scale != 1.0
    if guided:
        _ = config.null_label  # raises where guidance is impossible
    if decoder is not None:
        decoder.check_channels(config.in_channels)
    parts = sharding.data_size(mesh)
    batch = total if batch_size is None else min(batch_size, total)
    if batch < 1:
        raise Ptq4ditError(f"batch_size must be positive, not {batch_size}.")
    batch = -(-batch // parts) * parts

    slots = None
    num_kept = 0 if keep_steps is None else len(keep_steps)
    if keep_steps is not None:
        slots = np.full(tables.num_steps, num_kept, np.int32)
        slots[keep_steps] = np.arange(num_kept)

    model, decoder = sharding.replicate(mesh, (model, decoder))
    small: Any = tables, threefry(key), slots, np.float32(cfg_scale)
    # Without a mesh the program itself takes what is small to its device, all at once; put there one by one, a dozen arrays
    # took 1.5 ms of every call on an H200, about a step of DiT-XL/2 for one image.
    tables, key, slots, scale = small if mesh is None else sharding.replicate(mesh, small)

    def batch_of(array: np.ndarray | None, start: int, axis: int = 0) -> Any:
        if array is None:
            return None
        rows = _pad(array[:, start : start + batch] if axis else array[start : start + batch], batch, axis)
        return rows if mesh is None else sharding.shard(mesh, rows, axis)

    # Those transfers are meant, should a caller forbid others.
    placing = partial(jax.transfer_guard_host_to_device, "allow") if mesh is None else nullcontext
    indices_N, images, kept = np.arange(total, dtype=np.int32), [], []
    for start in range(0, total, batch):
        stop = min(start + batch, total)
        rows = batch_of(indices_N, start), batch_of(labels_N, start)
        with placing():
            x, inputs = sample_batch(
                model, tables, key, *rows, scale, batch_of(noise, start), batch_of(step_noise, start, 1), slots, decoder,
                stochastic=walk.stochastic, learned_variance=config.learn_sigma and walk.name == "ddpm",
                guided=guided, channels=cfg_channels, num_kept=num_kept, mesh=mesh,
            )  # fmt: skip
        x, inputs = jax.device_get((x, inputs))
        images.append(np.asarray(x, np.float32)[: stop - start])
        kept.append(np.asarray(inputs, np.float32)[:, : stop - start])
        if progress is not None:
            progress(stop, total)
    return np.concatenate(images), np.concatenate(kept, axis=1)


def to_uint8(images: ArrayLike) -> np.ndarray:
    """Images in [-1, 1] to uint8 by Meta's rule: ``clip(127.5 x + 128, 0, 255)``, truncated."""
    return np.asarray(jnp.clip(127.5 * jnp.asarray(images, jnp.float32) + 128, 0, 255)).astype(np.uint8)
