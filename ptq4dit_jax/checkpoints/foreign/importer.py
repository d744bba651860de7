"""Imports checkpoints: finds the weights, reads what is said about them, checks names and shapes, converts each tensor."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util

from ptq4dit_jax.checkpoints.float_dit import FLOATS
from ptq4dit_jax.checkpoints.foreign.diffusers_config import read_folder, read_scheduler
from ptq4dit_jax.checkpoints.foreign.evidence import Evidence, Ignored, collect
from ptq4dit_jax.checkpoints.foreign.layouts import DIFFUSERS, META, Entry, Layout, View
from ptq4dit_jax.checkpoints.foreign.names import normal_name
from ptq4dit_jax.checkpoints.foreign.objectives import drop_variance, find_schedule, fold_gains, fold_step_size
from ptq4dit_jax.checkpoints.foreign.options import ImportOptions
from ptq4dit_jax.checkpoints.foreign.parameter_sets import ParameterSet, find_parameters, listed
from ptq4dit_jax.checkpoints.foreign.shapes import by_number, our_shapes, read_config
from ptq4dit_jax.checkpoints.foreign.tensors import TensorFile, open_tensors
from ptq4dit_jax.edges import edge
from ptq4dit_jax.errors import Ptq4ditError, printable
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.networks.dit import DiTConfig, position_embedding
from ptq4dit_jax.schedules import FlowSchedule, NoiseSchedule, Schedule
from ptq4dit_jax.settings import changed


@dataclass(frozen=True)
class Imported:
    """What an import found.

    Attributes:
      layout: the family of the checkpoint.
      ema: whether the averaged weights were taken.
      words: which weights were taken, in words: averaged or as saved, and the prefix of their names.
      parameters: the number of parameters.
      config: the shape of the network.
      files: the files that the tensors came from.
      dtype: of the parameters: the file's if all share one of float32, bfloat16 and float16, else float32.
      evidence: value and source of each property that was decided.
      notes: sentences for the user: every guess with the option that overrides it, and every key that was not understood.
    """

    layout: str
    ema: bool
    words: str
    parameters: int
    config: DiTConfig
    files: tuple[Path, ...]
    dtype: str
    evidence: dict[str, str]
    notes: tuple[str, ...]


def import_checkpoint(
    path: str | os.PathLike[str],
    *,
    progress: Callable[[int, int], None] | None = None,
    **options: object,
) -> tuple[FloatDiT, Imported]:
    """Imports a float model from a checkpoint of another code base, recognized by content (:mod:`~.layouts` lists them).

    What the checkpoint says about itself (:mod:`~.evidence`) is followed, or refused by name. Options are for what it does not
    say; an option that contradicts it is refused.

    Args:
      path: a file, or a folder: a diffusers pipeline or its transformer, shards with their index, an Orbax checkpoint.
      progress: called with (tensors read, tensors in all).
      **options: fields of :class:`~.options.ImportOptions` and its sections, such as ``num_heads`` and ``ema``.

    Returns:
      The model, on the default device, and what was found. Peak memory is the model plus its largest stacked parameter.

    Raises:
      Ptq4ditError: nothing readable at ``path``; an unknown layout, or one of another network; missing, unexpected or misshapen
        tensors (all named at once); evidence that contradicts itself, the tensors or an option, or cannot be followed; NaN or
        infinity; a size that must be given; an option that does not apply.
    """
    given = changed(ImportOptions(), options)
    with edge(f"the checkpoint {os.fspath(path)}"):
        file = open_tensors(path)
        chosen = find_parameters(file, ema=given.ema, wanted=given.weights)
        layout, ignored = chosen.layout, Ignored(given.ignore)
        is_diffusers = layout is DIFFUSERS
        evidence = collect(file, ignored, without=("config.json",) if is_diffusers else (), is_on=layout.is_on)
        folder = file.files[0].parent
        epsilon, told = (
            read_folder(folder, evidence, ignored) if is_diffusers else (None, read_scheduler(folder, evidence, ignored))
        )
        _check_unread(file, chosen, folder, given.ema)
        if words := file.contents.dropped_words().removeprefix("; not understood: "):
            evidence.notes.append(f"Not read, as nothing here understands it: {words}.")
        config, view = read_config(file, chosen.view, layout, evidence, given.shape, epsilon if given.as_diffusers else None)
        config = _own_frequencies(view, layout, config, evidence)
        schedule = find_schedule(file, view, layout, config, evidence, given.schedule, told)
        _check_betas(view, schedule, evidence, ignored)
        ignored.check(file.path)
        layout.check(view, config)
        table = _own_positions(view, layout, config, evidence)
        params, dtype = _read(file, view, layout, config, progress)
        params = fold_gains(params, layout, config)
        if table is not None:
            params["position_embed/embedding"] = jnp.asarray(table, dtype)
            config = dataclasses.replace(config, position_table=True)
        if isinstance(schedule, FlowSchedule):
            params = fold_step_size(params, layout, config, schedule)
            params, config = drop_variance(params, config)
        model = FloatDiT(params=traverse_util.unflatten_dict(params, sep="/"), config=config, schedule=schedule)
        name = "SiT" if layout is META and isinstance(schedule, FlowSchedule) else layout.name
        decided = {what: printable(str(said)) for what, said in evidence.said.items()}
        return model, Imported(
            name,
            chosen.averaged,
            chosen.words,
            model.num_params,
            config,
            file.files,
            dtype,
            decided,
            tuple(map(printable, (*file.notes, *evidence.notes))),
        )


def _check_unread(file: TensorFile, chosen: ParameterSet, folder: Path, ema: bool) -> None:
    """Raises if something among the chosen weights was not understood, or averages are in a folder beside theirs."""
    # At the top level scripts save other things beside the weights; what is below a prefix of the weights is among them.
    roots = (f"{chosen.name}.",) if chosen.name else tuple({f"{name.partition('.')[0]}." for name in chosen.view})
    lost = [name for name in file.contents.unread if normal_name(name).startswith(roots)]
    if lost:
        what = f"{listed(lost)} ({file.contents.dropped_words().removeprefix('; ')})"
        raise Ptq4ditError(f"The checkpoint {file.path} holds something among its weights that cannot be read: {what}.")
    averages = folder.parent / f"{folder.name}_ema"
    if ema and not chosen.averaged and folder.name == "transformer" and averages.is_dir():
        raise Ptq4ditError(
            f"The averaged weights of {file.path} are in {averages}; pass that folder, or take those that were being trained, "
            "with ema=False or --model-weights."
        )


def _check_betas(view: View, schedule: Schedule, evidence: Evidence, ignored: Ignored) -> None:
    """Raises if a table of betas is saved with the network and differs from the schedule's."""
    if "betas" not in view or not isinstance(schedule, NoiseSchedule) or "betas" in ignored:
        return
    betas = view["betas"].read().astype(np.float64)
    if betas.shape != schedule.betas.shape or not np.allclose(betas, schedule.betas, rtol=1e-3):
        linear = f"{schedule.num_timesteps} steps from {schedule.beta_start:g} to {schedule.beta_end:g}"
        raise Ptq4ditError(
            f"The checkpoint {evidence.path} holds betas that are not those of the linear schedule of {linear}; say which it "
            "is (--timesteps, --beta-start, --beta-end), or leave them out with ignore (--ignore betas)."
        )


def _own_frequencies(view: View, layout: Layout, config: DiTConfig, evidence: Evidence) -> DiTConfig:
    """Returns the configuration with the stored frequencies of time, if there are any."""
    if layout.time_basis is None or layout.time_basis not in view:
        return config
    turns = view[layout.time_basis].read().astype(np.float64)
    if turns.shape != (config.frequency_size // 2,):
        raise Ptq4ditError(
            f"The frequencies {layout.time_basis} in {evidence.path} have the shape {turns.shape}, and this DiT has "
            f"{config.frequency_size // 2} of them."
        )
    if not np.isfinite(turns).all():
        raise Ptq4ditError(f"The checkpoint {evidence.path} holds NaN or infinity in {layout.time_basis}; get it anew.")
    return dataclasses.replace(config, frequencies=tuple((2 * np.pi * turns).tolist()))


def _own_positions(view: View, layout: Layout, config: DiTConfig, evidence: Evidence) -> np.ndarray | None:
    """Returns the stored table of positions (T, D), float32, if it is the model's own; None if it is the fixed one."""
    if layout.pos_embed is None or layout.pos_embed not in view:
        return None
    fixed, stored = position_embedding(config), view[layout.pos_embed].read().astype(np.float32)
    if stored.size != fixed.size:
        raise Ptq4ditError(
            f"The table {layout.pos_embed} in {evidence.path} has the shape {stored.shape}, and this DiT has "
            f"{fixed.shape[0]} tokens of width {fixed.shape[1]}."
        )
    table = stored.reshape(fixed.shape)
    if not np.isfinite(table).all():
        raise Ptq4ditError(f"The checkpoint {evidence.path} holds NaN or infinity in {layout.pos_embed}; get it anew.")
    if is_rounded(table, fixed):
        return None
    evidence.notes.append(f"Its positions ({layout.pos_embed}) are not the sine-cosine table: the model keeps them as its own.")
    return table


#: Types to which a table may have been rounded before it was cast to its present type.
_ROUNDED = (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)


def is_rounded(stored: np.ndarray, exact: np.ndarray) -> bool:
    """Whether ``stored`` is ``exact`` computed with other rounding errors, or rounded to a narrower type and then cast to any
    other. In the second case it holds only values of that type, each at most one step from the exact one."""
    if np.allclose(stored, exact, rtol=0, atol=1e-4):
        return True
    for kind in _ROUNDED:
        info = ml_dtypes.finfo(kind)
        step = np.maximum(np.abs(exact), float(info.smallest_normal)) * float(info.eps)
        if np.array_equal(stored.astype(kind).astype(np.float32), stored) and (np.abs(stored - exact) <= step + 1e-4).all():
            return True
    return False


def _read(
    file: TensorFile, view: View, layout: Layout, config: DiTConfig, progress: Callable[[int, int], None] | None
) -> tuple[dict[str, Any], str]:
    """Reads our parameters by flat name, converting one tensor at a time, and determines their dtype."""
    shapes, bad, done = our_shapes(layout, config), list[str](), 0
    entries = [entry for entry in layout.all_entries if entry.ours in shapes]
    names = [name for entry in entries for name in entry.names(config.depth)]
    kinds = {view[name].dtype.name for name in names}
    dtype = kinds.pop() if len(kinds) == 1 and kinds <= set(FLOATS) else "float32"

    def read(name: str) -> np.ndarray:
        nonlocal done
        array = view[name].read().astype(dtype, copy=False)
        if not np.isfinite(array).all():
            bad.append(name)
        done += 1
        if progress is not None:
            progress(done, len(names))
        return array

    params = {}
    for entry in entries:

        def block(i: int, entry: Entry = entry) -> np.ndarray:
            parts = [transform.ours(read(name.replace("{i}", str(i))), config) for name, transform in entry.parts]
            return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

        if entry.stacked:
            array = np.empty((config.depth, *shapes[entry.ours]), dtype)
            for i in range(config.depth):
                array[i] = block(i)
        else:
            array = block(0)
            for i in range(1, config.depth if "{i}" in entry.theirs[0] else 1):
                if not np.array_equal(array, block(i)):
                    name = entry.theirs[0].replace("{i}", str(i))
                    raise Ptq4ditError(
                        f"The checkpoint {file.path} is no DiT: {name} must be a copy of the one in block 0, and differs."
                    )
        params[entry.ours] = jnp.asarray(array)
    if bad:
        raise Ptq4ditError(
            f"The checkpoint {file.path} holds NaN or infinity in {listed(sorted(set(bad), key=by_number))}; get it anew."
        )
    return params, dtype
