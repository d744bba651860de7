"""The pipeline: observe, balance, choose ranges, pack, round or reconstruct. Each stage is a function of the ones before."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ptq4dit_jax import placement, processes, sharding
from ptq4dit_jax.calibration import CalibrationData, sample_trajectories
from ptq4dit_jax.config import QuantConfig
from ptq4dit_jax.engine import Provenance, QuantizedDiT
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.hashing import source_hash
from ptq4dit_jax.model import FloatDiT, has_nonfinite
from ptq4dit_jax.numerics import CALIBRATION, AnyKey, threefry
from ptq4dit_jax.progress import StageProgress, in_one, silent
from ptq4dit_jax.quality import REFUSE_BELOW, PoorQuality, Quality, measure, some_rows
from ptq4dit_jax.quantization.activations import choose_ranges
from ptq4dit_jax.quantization.balancing import balance
from ptq4dit_jax.quantization.journals import open_journal, report_resumed
from ptq4dit_jax.quantization.observations import observe
from ptq4dit_jax.quantization.weights import pack
from ptq4dit_jax.reconstruction import Journal, check_mesh, reconstruct, round_closed_form
from ptq4dit_jax.waiting import in_background


def quantize(
    model: FloatDiT,
    config: QuantConfig | None = None,
    *,
    key: AnyKey,
    calibration: CalibrationData | None = None,
    row_batch: int | None = None,
    mesh: Mesh | None = None,
    state: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    keep_poor: bool = False,
    progress: StageProgress | None = None,
) -> QuantizedDiT:
    """Quantizes a trained float DiT with PTQ4DiT.

    Args:
      model: the float model.
      config: settings. ``QuantConfig()`` is W8A8 with our best measured settings, ``QuantConfig.paper()`` has the paper's.
      key: seed of the calibration noise, unless ``calibration`` is given, and of the rows that a reconstruction draws.
      calibration: stored rows (:func:`ptq4dit_jax.calibration.stored_rows`), instead of sampled ones.
      row_batch: calibration rows in flight on each device, to bound memory; at least
        :data:`~ptq4dit_jax.calibration.MICRO_BATCH`. It does not affect the result.
      mesh: its devices share the calibration rows, and the rows of each batch of a reconstruction. Their number does not affect
        the result, except for last bits of a reconstruction with ``accumulation_chunks=1``, the default on GPUs and TPUs. It
        may span the processes of a run, all of which then call this with the same arguments.
      state: a folder for what a reconstruction has learned so far. If it holds an interrupted run of the same model,
        settings, key and rows, that run resumes. The folder is kept; delete it when the result is safe. Of the processes that
        a mesh spans, the first alone uses it.
      fresh: start over, whatever ``state`` holds.
      keep_poor: return even a model that predicts worse than :data:`ptq4dit_jax.quality.REFUSE_BELOW`.
      progress: called as stages advance.

    Returns:
      The integer model, self-contained. Its provenance holds its quality, measured on a few of the calibration rows.

    Warns:
      PoorQuality: that quality is below :data:`ptq4dit_jax.quality.WARN_BELOW`.

    Raises:
      Ptq4ditError: an invalid argument; NaN or infinity in the weights, the calibration rows, their statistics or the result; a
        result of too poor quality, unless ``keep_poor``.
    """
    model, key, calibration = sharding.own((model, key, calibration))
    config, key, progress = (config or QuantConfig()).for_network(model.config), threefry(key), progress or silent
    if row_batch is not None and row_batch < 1:
        raise Ptq4ditError(f"row_batch must be positive, not {row_batch}.")
    if calibration is None:
        config = config.resolve(model.schedule, model.config)
    if bad := has_nonfinite(model.params):
        raise Ptq4ditError(f"The weights hold NaN or infinity in {', '.join(bad[:3])}; a model must be finite to be quantized.")
    if config.learning is not None:
        check_mesh(config.learning, sharding.without_model(mesh))
    source_sha256 = in_background(lambda: source_hash(model.params))
    with open_journal(config, model, source_sha256, key, calibration, state, fresh, mesh) as journal:
        if journal is not None:
            report_resumed(journal, model, progress)
        return _quantized(model, config, key, calibration, row_batch, mesh, journal, source_sha256, keep_poor, progress)


def _quantized(
    model: FloatDiT,
    config: QuantConfig,
    key: AnyKey,
    calibration: CalibrationData | None,
    row_batch: int | None,
    mesh: Mesh | None,
    journal: Journal | None,
    source_sha256: Callable[[], str],
    keep_poor: bool,
    report: StageProgress,
) -> QuantizedDiT:
    """Runs the stages of :func:`quantize`, with arguments checked and the journal open."""
    # On one device, like all that is computed from it. Several devices run one program each (:func:`sharding.deal_out`); the
    # rest is a program of one.
    model = placement.put(model.astype(jnp.float32), sharding.home(mesh))
    model = dataclasses.replace(model, precision=CALIBRATION)
    tell = lambda stage: lambda done, total: report(stage, done, total)
    source = "given" if calibration is not None else f"sampled, key {jax.random.key_data(key).tolist()}"
    if calibration is None:
        report("sample calibration rows", 0, config.calibration.rows)
        calibration = sample_trajectories(
            model, config.calibration, key=key, row_batch=row_batch, mesh=mesh, progress=tell("sample calibration rows")
        )
    calibration = CalibrationData(x=np.asarray(calibration.x), t=np.asarray(calibration.t), y=np.asarray(calibration.y))
    some = some_rows(calibration)

    with in_one(report, "gather channel statistics"):
        observed = observe(model, calibration, row_batch=row_batch, mesh=mesh)
    balanced = balance(
        model, config, observed, calibration, row_batch=row_batch, mesh=mesh, progress=tell("try ways of balancing")
    )
    balanced = sharding.agreed(mesh, balanced)
    folded = balanced.folded
    with in_one(report, "choose activation ranges"):
        ranged = choose_ranges(balanced, config, observed, calibration, row_batch=row_batch, mesh=mesh)
    quantized = sharding.agreed(mesh, pack(balanced, ranged, config, observed, progress=tell("choose weight ranges")))
    _check_result(quantized)
    facts = {
        "source_sha256": source_sha256(),
        "settings": config.to_dict(),
        "calibration": {"rows": source, "steps": calibration.num_steps, "rows_per_step": calibration.num_rows},
    }
    if balanced.chosen:
        facts["balancing"] = {site: chosen.to_dict() for site, chosen in balanced.chosen.items()}
    if config.rounding == "gptq":
        quantized, rounded = round_closed_form(
            folded,
            quantized,
            calibration,
            search=config.range_search,
            mesh=mesh,
            progress=report,
        )
        facts["rounding"] = {row.pop("part"): row for row in rounded}
        _check_result(quantized)
    if config.learning is not None:
        quantized, learned = reconstruct(
            folded,
            quantized,
            calibration,
            config.learning,
            key=jax.random.fold_in(key, 1),
            journal=journal,
            search=config.range_search,
            mesh=mesh,
            progress=report,
        )
        facts["reconstruction"] = {row.pop("part"): row for row in learned}
        _check_result(quantized)
    with in_one(report, "measure the result") as note:
        quality = measure(model, folded, quantized, some)
        note(f"{quality}" if not quality.is_poor else f"SQNR {quality.sqnr_mean_db:.1f} dB")
    _check_quality(quality, model.schedule.objective, keep_poor, None if journal is None else journal.folder)
    facts["quality"] = quality.to_dict()
    quantized = placement.placed(mesh, quantized)
    facts = processes.on_first(lambda: facts) if sharding.spans_processes(mesh) else facts
    return dataclasses.replace(quantized, provenance=Provenance(facts))


def _check_quality(quality: Quality, objective: str, keep_poor: bool, learned: Path | None) -> None:
    """Refuses a useless model, and warns of a poor one. ``learned`` is the journal's folder."""
    if not quality.is_poor:
        return
    words = f"The quantized model's predicted {objective} has an SQNR of {quality.sqnr_mean_db:.1f} dB"
    words += f", worst in {', '.join(map(str, quality.worst))}"
    remedy = "use more bits, another policy or more calibration rows"
    if quality.sqnr_mean_db < REFUSE_BELOW and not keep_poor:
        again = "" if learned is None else f"; what was learned is in {learned}, so nothing is learned again"
        raise Ptq4ditError(
            f"{words}, and below {REFUSE_BELOW:g} dB a model is refused; {remedy}, or keep it with --keep-poor "
            f"(keep_poor=True){again}."
        )
    warnings.warn(f"{words}; {remedy}.", PoorQuality, stacklevel=4)


def _check_result(quantized: QuantizedDiT) -> None:
    if bad := has_nonfinite(quantized):
        raise Ptq4ditError(
            f"The quantized model would hold NaN or infinity in {', '.join(bad[:3])}; check that the float model makes good "
            "samples."
        )
