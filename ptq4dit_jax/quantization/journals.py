"""Where an interrupted reconstruction resumes: the journal of a run, and what tells runs apart."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh

from ptq4dit_jax import sharding
from ptq4dit_jax.calibration import CalibrationData
from ptq4dit_jax.checkpoints.float_dit import model_meta
from ptq4dit_jax.config import QuantConfig
from ptq4dit_jax.devices import default
from ptq4dit_jax.hashing import content_hash
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.numerics import AnyKey
from ptq4dit_jax.progress import StageProgress
from ptq4dit_jax.reconstruction import Journal, SharedJournal, units


def open_journal(
    config: QuantConfig,
    model: FloatDiT,
    source_sha256: Callable[[], str],
    key: AnyKey,
    calibration: CalibrationData | None,
    state: str | os.PathLike[str] | None,
    fresh: bool,
    mesh: Mesh | None = None,
) -> contextlib.AbstractContextManager[Journal | None]:
    """Opens the journal before any long work, so that a run that does not match is refused at once.

    The number of devices is not part of the fingerprint, since no integer depends on it. With ``accumulation_chunks=1``,
    last bits of gradients do, but two runs on one GPU may differ in those too.
    """
    if config.learning is None or state is None:
        return contextlib.nullcontext()
    given = None if calibration is None else content_hash({name: getattr(calibration, name) for name in ("x", "t", "y")})
    fingerprint = {
        "weights": source_sha256(),
        "network": model_meta(model.config, model.schedule),
        "settings": config.to_dict() | {"rounding": config.rounding},
        "key": jax.random.key_data(key).tolist(),
        "calibration rows": given or "sampled by these settings and key",
        "software": {name: _version(name) for name in ("ptq4dit-jax", "jax", "jaxlib")},
        "device": {"platform": default().platform, "kind": default().device_kind},
    }
    kind = SharedJournal if sharding.spans_processes(mesh) else Journal
    return kind(Path(state), fingerprint, fresh=fresh)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report_resumed(journal: Journal, model: FloatDiT, report: StageProgress) -> None:
    """Reports what an interrupted run left to resume from."""
    names, (finished, current) = [unit.name for unit in units(model.config)], journal.standing
    if not finished and current is None:
        return
    note = f"units done: {len(finished)} of {len(names)}" + (f", up to {names[max(finished)]}" if finished else "")
    if current is not None:
        note += f"; {names[current[0]]} goes on from iteration {current[1]}"
    report("resume reconstruction", len(finished), len(names), note)
