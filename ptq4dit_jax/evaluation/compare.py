"""Compares a float model with approximations of it: predictions, layer outputs, and images on the same noise.

Every figure is paired: both models see the same inputs, labels and noise. The noise floor, which is the reference computing in
bfloat16, is measured beside them: an approximation close to it has lost nothing that matters in practice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from ptq4dit_jax import sharding
from ptq4dit_jax.diffusion import Sampling
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.evaluation import metrics
from ptq4dit_jax.evaluation.metrics import Interval, StepsSQNR
from ptq4dit_jax.evaluation.probes import layer_sqnr_along, predicted_noise
from ptq4dit_jax.guidance import Guidance, Predictor
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.dit import DiTConfig
from ptq4dit_jax.numerics import AnyKey
from ptq4dit_jax.progress import StageProgress, silent
from ptq4dit_jax.sampling import Labels, Progress, check_labels, run_chain
from ptq4dit_jax.schedules import Schedule
from ptq4dit_jax.vae import VAEDecoder
from ptq4dit_jax.waiting import ready

REFERENCE, NOISE_FLOOR = "float32", "bfloat16"
_LAYER_STEPS, _LAYER_ROWS = 5, 16
_TRAJECTORIES = "sample trajectories of the reference"
#: Image values for which a metric is computed at once: 170 pictures of 256 px, 42 of 512 px.
_VALUES_PER_CALL = 2**25


class _Placed(TypedDict, total=False):
    """Where samples are made, and what decodes them to pictures."""

    decoder: VAEDecoder | None
    mesh: Mesh | None


class _ChainSettings(_Placed, total=False):
    """Further optional arguments of a chain."""

    batch_size: int | None
    noise: ArrayLike | None
    step_noise: ArrayLike | None
    keep_steps: np.ndarray | None


def same_noise_images(
    models: Mapping[str, Predictor],
    labels: Labels | None,
    key: AnyKey,
    sampling: Sampling = Sampling(),
    *,
    progress: Progress | None = None,
    **settings: Unpack[_ChainSettings],
) -> dict[str, np.ndarray]:
    """Samples images (N, H, W, C) of every model on the same noise; ``settings`` go to :func:`ptq4dit_jax.sampling.run_chain`.

    ``progress`` is called with (images done, images in all), counted over all models.
    """
    images = {}
    for index, (name, model) in enumerate(models.items()):
        images[name], _ = run_chain(
            model, labels, key, sampling, progress=_within(progress, index, len(models)), what=f"{name}'s image", **settings
        )
    return images


def _within(progress: Progress | None, index: int, count: int) -> Progress | None:
    """Returns a callback that reports progress of part ``index`` of ``count`` equal parts as progress of the whole."""
    return None if progress is None else lambda done, total: progress(index * total + done, count * total)


def num_bytes(model: object) -> int:
    """Returns the bytes of all arrays of a model as they are in memory; packed integers count as packed."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFigures:
    """Figures of one model against the reference.

    ``sqnr_mean_db``, ``sqnr_pooled_db`` and ``step_sqnr_db`` (S,) are those of the guided prediction, noise or velocity, as
    :class:`ptq4dit_jax.evaluation.metrics.StepsSQNR` defines them. ``layer_sqnr_db`` (L,) is by site, with powers pooled over
    steps. ``psnr_db`` and ``ssim`` (N,) are those of the sampled images, with bootstrap intervals of their means.
    """

    num_bytes: int
    sqnr_mean_db: float
    sqnr_pooled_db: float
    step_sqnr_db: np.ndarray
    layer_sqnr_db: dict[str, np.ndarray]
    psnr_db: np.ndarray
    psnr_interval: Interval
    ssim: np.ndarray
    ssim_interval: Interval

    @classmethod
    def of(
        cls, model: object, sqnr: StepsSQNR, layers: dict[str, np.ndarray], psnr: np.ndarray, ssim: np.ndarray, seed: int
    ) -> ModelFigures:
        """Builds the figures from the measurements of a model; ``seed`` is for the bootstrap."""
        return cls(
            num_bytes=num_bytes(model),
            sqnr_mean_db=float(sqnr.mean_db),
            sqnr_pooled_db=float(sqnr.pooled_db),
            step_sqnr_db=np.asarray(sqnr.step_db),
            layer_sqnr_db=layers,
            psnr_db=psnr,
            psnr_interval=metrics.bootstrap_interval(psnr, seed),
            ssim=ssim,
            ssim_interval=metrics.bootstrap_interval(ssim, seed),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """All figures of :func:`compare`.

    ``figures`` holds the noise floor (:data:`NOISE_FLOOR`) first, then the other models. ``images`` (N, H, W, C) also holds the
    reference (:data:`REFERENCE`), first. ``timesteps`` (S,) are those of ``step_sqnr_db``, noisiest first. ``data_range`` is
    the full scale of PSNR and SSIM: 2 for images, the span of the reference's samples for latents.
    """

    figures: dict[str, ModelFigures]
    reference_bytes: int
    timesteps: np.ndarray
    labels: np.ndarray
    images: dict[str, np.ndarray]
    data_range: float
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Returns everything except the images as plain dicts, lists, strings and finite numbers; other numbers become None."""
        return {
            "reference": {"name": REFERENCE, "num_bytes": self.reference_bytes},
            "noise_floor": NOISE_FLOOR,
            "models": {name: plain(dataclasses.asdict(figures)) for name, figures in self.figures.items()},
            "timesteps": self.timesteps.tolist(),
            "labels": self.labels.tolist(),
            "data_range": self.data_range,
            "settings": plain(self.settings),
        }


def plain(value: object) -> Any:
    """Converts to JSON's types: arrays become lists, named tuples dicts, non-finite numbers None, unknown objects text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return plain(np.asarray(value).tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _check_models(reference: FloatDiT, others: Mapping[str, Predictor]) -> None:
    for name, model in others.items():
        if name in (REFERENCE, NOISE_FLOOR):
            raise Ptq4ditError(f"A compared model cannot be named {name!r}, which is a row of every comparison; rename it.")
        for part in ("config", "schedule"):
            ours, theirs = (_settings(getattr(m, part)) for m in (reference, model))
            keys = [key for key in ours if key in theirs and ours[key] != theirs[key]]
            differing = [f"{key} ({ours[key]} against {theirs[key]})" for key in keys]
            if differing:
                raise Ptq4ditError(
                    f"Model {name!r} is not a quantization of the reference: they differ in {', '.join(differing)}; "
                    "compare it with the model that it was made from."
                )


def _check_counts(sqnr_steps: int, sqnr_rows: int, batch_size: int | None) -> None:
    if sqnr_steps < 1 or sqnr_rows < 1:
        raise Ptq4ditError(f"SQNR needs at least one step and one row, not {sqnr_steps} steps and {sqnr_rows} rows.")
    if batch_size is not None and batch_size < 1:
        raise Ptq4ditError(f"batch_size must be positive, not {batch_size}.")


def _settings(part: DiTConfig | Schedule) -> dict[str, Any]:
    objective = {} if isinstance(part, DiTConfig) else {"objective": part.objective}
    return objective | dataclasses.asdict(part)


def _evenly(count: int, wanted: int) -> np.ndarray:
    """Returns at most ``wanted`` positions spread evenly over ``count``, including both ends."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int))


def _full_scale(images: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], float]:
    """Returns images, clipped as they would be written, and their range; or latents, unchanged, and the reference's span."""
    if images[REFERENCE].shape[-1] in (1, 3):
        return {name: array.clip(-1, 1) for name, array in images.items()}, metrics.DATA_RANGE
    return images, float(np.ptp(images[REFERENCE]))


def _check_prediction(name: str, prediction: np.ndarray, t: np.ndarray) -> None:
    """Raises unless predictions (S, N, H, W, C) at times (S,) are finite."""
    finite = np.isfinite(prediction).all((1, 2, 3, 4))
    if not finite.all():
        step = int(np.argmin(finite))
        raise Ptq4ditError(
            f"The prediction of the model {name!r} holds NaN or infinity at step {step + 1} of the {len(t)} compared "
            f"(t = {t[step]:g}); compute in float32 (astype), or quantize with wider activations."
        )


_steps_sqnr = jax.jit(metrics.steps_sqnr)
_psnr_db, _ssim = jax.jit(metrics.psnr_db), jax.jit(metrics.ssim)


def _per_image(metric: Callable[..., jax.Array], reference: np.ndarray, images: np.ndarray, data_range: float) -> np.ndarray:
    """Computes a metric (N,), some images at a time."""
    rows = max(1, _VALUES_PER_CALL // math.prod(images.shape[1:]))
    starts = range(0, len(images), rows)
    pairs = ((array[start : start + rows] for array in (reference, images)) for start in starts)
    return np.concatenate([np.asarray(ready(metric(*pair, data_range))) for pair in pairs])


def compare(
    reference: FloatDiT,
    others: Mapping[str, Predictor],
    *,
    labels: Labels | None,
    key: AnyKey,
    sampling: Sampling = Sampling(),
    batch_size: int | None = None,
    sqnr_steps: int = 25,
    sqnr_rows: int = 64,
    seed: int = 0,
    decoder: VAEDecoder | None = None,
    mesh: Mesh | None = None,
    progress: StageProgress | None = None,
) -> Comparison:
    """Measures ``others`` and the noise floor against ``reference`` computing in float32.

    Args:
      reference: the float model.
      others: models by their names in the report.
      labels: (N,) classes to sample for the image figures; for models without classes, the number N of images.
      key: of the noise, shared by all models.
      sampling, batch_size: as for :func:`ptq4dit_jax.sampling.sample`.
      sqnr_steps: the number of steps, evenly spaced on the reference's own trajectories, at which predictions are compared.
      sqnr_rows: the number of labels, evenly spaced, on which they are compared; at most ``batch_size``.
      seed: of the bootstrap.
      decoder: decodes latents to pictures, which the image figures then compare.
      mesh: shards the sampling over ``data``; the rest runs on one device.
      progress: called as stages advance: the reference's trajectories and all models' samples (in images), and the figures (in
        models).

    Raises:
      Ptq4ditError: models or settings cannot be compared, or samples or predictions of a model, which the message names, hold
        NaN or infinity.
    """
    _check_models(reference, others)
    _check_counts(sqnr_steps, sqnr_rows, batch_size)
    progress = progress or silent
    reference, others, decoder, key = sharding.own((reference, dict(others), decoder, key))
    reference = reference.astype(jnp.float32)
    labels_N = check_labels(labels, reference.config)
    resolved = sampling.resolve(reference.schedule, reference.config)
    models = {NOISE_FLOOR: reference.astype(jnp.bfloat16), **others}
    rows = _evenly(len(labels_N), min(sqnr_rows, batch_size or sqnr_rows))
    placed: _Placed = {"decoder": decoder, "mesh": mesh}
    chain = partial(run_chain, key=key, sampling=sampling, progress=partial(progress, _TRAJECTORIES), **placed)
    progress(_TRAJECTORIES, 0, len(rows))
    seen, sampled = _trajectories(chain, reference, sampling.guidance, resolved.tables().t, labels_N[rows], sqnr_steps)
    # If the trajectories are those of all labels, their ends are the reference's images.
    pending = models if len(rows) == len(labels_N) else {REFERENCE: reference, **models}
    sampling_all = partial(progress, "sample on the same noise")
    others_images = same_noise_images(pending, labels_N, key, sampling, progress=sampling_all, batch_size=batch_size, **placed)
    images, data_range = _full_scale({REFERENCE: sampled} | others_images)

    noise = seen.predicted_by(REFERENCE, reference)
    of_layers = seen.for_layers(reference, guided=resolved.guidance.guided is not None)
    figures: dict[str, ModelFigures] = {}
    for name, model in models.items():
        progress("measure", len(figures), len(models))
        psnr, similarity = (_per_image(metric, images[REFERENCE], images[name], data_range) for metric in (_psnr_db, _ssim))
        sqnr = _steps_sqnr(noise, seen.predicted_by(name, model))
        layers = layer_sqnr_along(reference, model, *of_layers)
        figures[name] = ModelFigures.of(model, sqnr, layers, psnr, similarity, seed)
    progress("measure", len(models), len(models))
    settings = {
        "objective": reference.schedule.objective,
        **resolved.to_dict(),
        "images": len(labels_N),
        "sqnr_steps": len(seen.t),
        "sqnr_rows": len(rows),
        "bootstrap_seed": seed,
    }
    return Comparison(
        figures=figures,
        reference_bytes=num_bytes(reference),
        timesteps=seen.t,
        labels=labels_N,
        images=images,
        data_range=data_range,
        settings=settings,
    )


@dataclasses.dataclass(frozen=True)
class _Seen:
    """The inputs (S, N, H, W, C) of the reference's trajectories, times (S,) and labels (N,), for comparing predictions."""

    inputs: np.ndarray
    t: np.ndarray
    y: np.ndarray
    guidance: Guidance

    def predicted_by(self, name: str, model: Predictor) -> np.ndarray:
        """Returns the guided prediction of a model (S, N, H, W, C), which must be finite."""
        prediction = predicted_noise(model, self.inputs, self.t, self.y, self.guidance)
        _check_prediction(name, prediction, self.t)
        return prediction

    def for_layers(self, reference: FloatDiT, *, guided: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns inputs, times and labels of a few rows of a few steps, because comparing layers holds whole activations."""
        few = _evenly(len(self.t), _LAYER_STEPS)
        inputs, labels = self.inputs[few, :_LAYER_ROWS], self.y[:_LAYER_ROWS]
        if guided:
            inputs = np.concatenate([inputs] * 2, axis=1)
            labels = np.concatenate([labels, np.full_like(labels, reference.config.null_label)])
        return inputs, self.t[few], labels


def _trajectories(
    chain: Callable[..., tuple[np.ndarray, np.ndarray]],
    reference: FloatDiT,
    guidance: Guidance,
    timesteps: np.ndarray,
    labels: np.ndarray,
    steps: int,
) -> tuple[_Seen, np.ndarray]:
    """Returns the reference's inputs on its own trajectories, at ``steps`` of all ``timesteps``, and its images."""
    kept = _evenly(len(timesteps), steps)
    images, inputs = chain(reference, labels, keep_steps=kept, what="The reference's image")
    return _Seen(inputs, timesteps[kept], labels, guidance), images
