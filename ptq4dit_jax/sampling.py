"""Samples images from a float or quantized model, all at once or as a stream of batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Float, Float32, UInt8

from ptq4dit_jax import placement, sharding
from ptq4dit_jax.chain import Progress as Progress
from ptq4dit_jax.chain import Request
from ptq4dit_jax.diffusion import ResolvedSampling, Sampling, chosen_sampling
from ptq4dit_jax.edges import quoted
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.exported import ExportedSampler
from ptq4dit_jax.guidance import Predictor
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.numerics import AnyKey, threefry
from ptq4dit_jax.samplers import AnyTables
from ptq4dit_jax.vae import VAEDecoder

#: Class labels (N,); for a model without classes, the number of images.
Labels: TypeAlias = ArrayLike | Sequence[int]

#: The most samples per call. Each keeps a label and some host memory; FID takes 50,000.
MAX_SAMPLES = 10**7


def check_count(count: int) -> None:
    """Raises if one call cannot make this number of samples."""
    if count > MAX_SAMPLES:
        raise Ptq4ditError(f"One run makes at most {MAX_SAMPLES:,} images, not {count:,} images; ask for fewer.")


def check_labels(labels: Labels | None, config: DiTConfig) -> np.ndarray:
    """Returns labels as (N,) int32, or raises an error that names the first label out of range.

    For a DiT without classes, pass the number of images instead, or None for one. Its labels are zeros (N,), which may also be
    passed.
    """
    if not config.num_labels:
        return _no_labels(labels)
    array = np.atleast_1d(np.asarray(labels))
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise Ptq4ditError(f"Labels must be a non-empty list of integers, not {labels!r}.")
    check_count(array.size)
    top = config.num_classes - 1 + config.null_class
    wrong = array[(array < 0) | (array > top)]
    if wrong.size:
        null = f" ({top} is the null class)" if config.null_class else ""
        raise Ptq4ditError(f"Label {wrong[0]} is out of range; this model has classes 0 to {config.num_classes - 1}{null}.")
    return array.astype(np.int32)


def _no_labels(labels: Labels | None) -> np.ndarray:
    array = np.asarray(1 if labels is None else labels)
    if array.ndim > 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise Ptq4ditError(f"This DiT has no classes, so instead of labels it takes a number of images, not {labels!r}.")
    if array.ndim == 1:
        if array.any():
            raise Ptq4ditError(
                f"Label {array[array != 0][0]} names no class, since this DiT has none; give the number of images instead."
            )
        return np.zeros(array.shape, np.int32)
    if array < 1:
        raise Ptq4ditError(f"This DiT has no classes, so labels is the number of images, which must be positive, not {array}.")
    check_count(int(array))
    return np.zeros(int(array), np.int32)


def _check_noise(name: str, array: ArrayLike | None, shape: tuple[int, ...]) -> np.ndarray | None:
    if array is None:
        return None
    given = np.asarray(array, np.float32)
    if given.shape != shape:
        raise Ptq4ditError(f"{name} must have shape {shape}, not {given.shape}.")
    if not np.isfinite(given).all():
        raise Ptq4ditError(f"{name} contains NaN or infinity.")
    return given


def sample(
    model: Predictor,
    labels: Labels | None,
    *,
    key: AnyKey,
    sampling: Sampling | None = None,
    batch_size: int | None = None,
    noise: Float[ArrayLike, "N H W C"] | None = None,
    step_noise: Float[ArrayLike, "S N H W C"] | None = None,
    decoder: VAEDecoder | None = None,
    mesh: Mesh | None = None,
    program: ExportedSampler | None = None,
    progress: Progress | None = None,
    **settings: object,
) -> Float32[np.ndarray, "N ..."]:
    """Samples one image (or latent) per label.

    Args:
      model: a :class:`FloatDiT` or :class:`QuantizedDiT`.
      labels: (N,) class labels; for a model without classes, the number N of images, or None for one.
      key: the seed. The noise of sample ``i`` depends only on the key and ``i``, not on the batch size or the devices.
      sampling: how to get from noise to image; settings left open follow the model.
      batch_size: images per compiled call; the last batch is padded. By default up to 256 per device, fewer if the compiled
        program would not fit into the free memory; with ``program``, its own.
      noise: initial noise (N, H, W, C) instead of the key's.
      step_noise: per-step noise (S, N, H, W, C) for stochastic samplers instead of the key's.
      decoder: decodes the latents to pictures, within the same compiled program.
      mesh: shards each batch over the mesh's ``data`` axis.
      program: an exported sampler of models of this form, which then need not be traced
        (:func:`~ptq4dit_jax.export_sampler`). It samples as it was exported to, except for what ``sampling`` or ``settings``
        change. The images are the same as without it in batches of its size.
      progress: called with (images done, images in all) after each batch.
      **settings: single settings, as a short form instead of ``sampling``. ``sampler``, ``steps`` and ``eta`` are fields of
        :class:`~ptq4dit_jax.diffusion.Sampling`; ``cfg_scale``, ``cfg_channels`` and ``guidance_interval`` are fields of its
        :class:`~ptq4dit_jax.guidance.Guidance`. ``cfg_scale=1`` turns guidance off and halves the work.

    Returns:
      (N, H, W, C) float32, on the host, in the range that the model was trained on; with a decoder, its pictures, in [-1, 1]
      except for overshoots.

    Raises:
      Ptq4ditError: an argument makes no sense, ``program`` is not for it, or a sample holds NaN or infinity; the message names
        the difference, or the step.
    """
    sampling = chosen_sampling(sampling, settings, _default_sampling(program))
    resolved = sampling.resolve(model.schedule, model.config)
    request = _prepare(model, labels, key, resolved, noise, step_noise, decoder, mesh, program=program)
    return request.collect(request.batch_size(batch_size), progress)[0]


def sample_batches(
    model: Predictor,
    labels: Labels,
    *,
    key: AnyKey,
    sampling: Sampling | None = None,
    batch_size: int | None = None,
    noise: Float[ArrayLike, "N H W C"] | None = None,
    step_noise: Float[ArrayLike, "S N H W C"] | None = None,
    decoder: VAEDecoder | None = None,
    mesh: Mesh | None = None,
    program: ExportedSampler | None = None,
) -> Iterator[tuple[int, Float32[np.ndarray, "B ..."]]]:
    """Runs :func:`sample` batch by batch, so that any number of images needs the memory of one batch.

    Arguments are checked at once, before the first batch is requested.

    Returns:
      An iterator over pairs, in order: the index of a batch's first image, and the batch (B, H, W, C) float32.

    Raises:
      Ptq4ditError: as for :func:`sample`; a sample that is not finite is reported with its batch.
    """
    sampling = chosen_sampling(sampling, {}, _default_sampling(program))
    resolved = sampling.resolve(model.schedule, model.config)
    request = _prepare(model, labels, key, resolved, noise, step_noise, decoder, mesh, program=program)
    batch = request.batch_size(batch_size)
    return ((start, images) for start, images, _ in request.batches(batch))


def _default_sampling(program: ExportedSampler | None) -> Sampling:
    if not isinstance(program, ExportedSampler | None):
        raise Ptq4ditError(f"program must be an exported sampler, as load_sampler(path) returns, not {quoted(program)}.")
    return Sampling() if program is None else program.sampling


def compile_exported(
    program: ExportedSampler, model: Predictor, *, decoder: VAEDecoder | None = None, mesh: Mesh | None = None
) -> None:
    """Compiles an exported sampler for these devices and a model of its form, so that JAX's compilation cache has it.

    Raises:
      Ptq4ditError: the program is not for them.
    """
    resolved = program.sampling.resolve(model.schedule, model.config)
    labels = np.zeros(program.batch_size, np.int32)
    _prepare(model, labels, jax.random.key(0), resolved, decoder=decoder, mesh=mesh, program=program).compile()


def run_chain(
    model: Predictor,
    labels: Labels | None,
    key: AnyKey,
    sampling: Sampling,
    *,
    batch_size: int | None = None,
    noise: Float[ArrayLike, "N H W C"] | None = None,
    step_noise: Float[ArrayLike, "S N H W C"] | None = None,
    decoder: VAEDecoder | None = None,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
    keep_steps: np.ndarray | None = None,
    what: str = "Image",
) -> tuple[np.ndarray, np.ndarray]:
    """Runs :func:`sample`. Besides the images, returns the inputs of the steps ``keep_steps`` (positions in the chain, 0 is the
    noisiest), (len(keep_steps), N, H, W, C). ``what`` is the word for a sample in an error."""
    resolved = sampling.resolve(model.schedule, model.config)
    request = _prepare(model, labels, key, resolved, noise, step_noise, decoder, mesh, keep_steps, what)
    return request.collect(request.batch_size(batch_size), progress)


def kept_inputs(
    model: Predictor,
    labels: Labels,
    key: AnyKey,
    sampling: ResolvedSampling,
    keep_steps: np.ndarray,
    *,
    batch_size: int,
    mesh: Mesh | None = None,
    ahead: int = 2,
    progress: Progress | None = None,
    what: str = "Image",
) -> np.ndarray:
    """Returns the inputs of the steps ``keep_steps`` as :func:`run_chain` does, in bytes that do not depend on the devices.

    Every batch has ``batch_size`` rows, the last one padded, and runs on one device. The devices of ``mesh`` share the batches;
    each has begun at most ``ahead`` of them.
    """
    request = _prepare(model, labels, key, sampling, keep_steps=keep_steps, what=what)
    return request.collect_from_devices(batch_size, mesh, ahead, progress)[1]


def _prepare(
    model: Predictor,
    labels: Labels | None,
    key: AnyKey,
    sampling: ResolvedSampling,
    noise: Float[ArrayLike, "N H W C"] | None = None,
    step_noise: Float[ArrayLike, "S N H W C"] | None = None,
    decoder: VAEDecoder | None = None,
    mesh: Mesh | None = None,
    keep_steps: np.ndarray | None = None,
    what: str = "Image",
    program: ExportedSampler | None = None,
) -> Request:
    """Returns the request of :func:`run_chain`, checked and placed."""
    config = model.config
    labels_N = check_labels(labels, config)
    tables: AnyTables = sampling.tables()
    shape = (len(labels_N), *config.image_shape)
    noise = _check_noise("noise", noise, shape)
    step_noise = _check_noise("step_noise", step_noise, (tables.num_steps, *shape))
    if decoder is not None:
        decoder.check_channels(config.in_channels)
    sharding.data_size(mesh)  # raises on a mesh that cannot be used

    model, decoder = placement.placed(mesh, (model, decoder))
    small = tables, threefry(sharding.own(key))
    # Without a mesh, the call itself transfers small arrays to its device, all at once. Placed one by one, a dozen arrays took
    # 1.5 ms of every call on an H200, about as long as a step of DiT-XL/2 for one image.
    tables, key = small if mesh is None else sharding.replicate(mesh, small)
    return Request(
        model=model,
        labels_N=labels_N,
        sampling=sampling,
        tables=tables,
        key=key,
        noise=noise,
        step_noise=step_noise,
        decoder=decoder,
        mesh=mesh,
        keep_steps=keep_steps,
        what=what,
        exported=program,
    )


def to_uint8(images: Float[ArrayLike, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Converts images in [-1, 1] to uint8 by Meta's rule: ``clip(127.5 x + 128, 0, 255)``, truncated."""
    return np.asarray(jnp.clip(127.5 * jnp.asarray(images, jnp.float32) + 128, 0, 255)).astype(np.uint8)
