"""Importing: find the layout, read off the shape of the network, check every name and shape, then convert tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ptq4dit_jax.checkpoints.float_dit import FLOATS
from ptq4dit_jax.checkpoints.foreign.layouts import LAYOUTS, META, Entry, Layout, View
from ptq4dit_jax.checkpoints.foreign.objectives import drop_variance, find_schedule, fold_step_size
from ptq4dit_jax.checkpoints.foreign.shapes import SHOWN, Given, by_number, listed, names_of, our_shapes, read_config
from ptq4dit_jax.checkpoints.foreign.tensors import TensorFile, local_path, open_tensors
from ptq4dit_jax.dit import DiTConfig, position_embedding
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.model import FloatDiT
from ptq4dit_jax.schedules import FlowSchedule

#: Words in names: of averaged weights, and of an optimizer's state, which mirrors the names of the weights.
_EMA = {"ema", "ema_params", "params_ema", "model_eps", "ema_state", "model_ema", "ema_model"}
_OPTIMIZER = {"opt", "opt_state", "optimizer", "optimizer_state", "optimizer_states", "mu", "nu", "exp_avg", "exp_avg_sq"}


@dataclass(frozen=True)
class Imported:
    """What an import found.

    Attributes:
      layout: the family of the checkpoint.
      ema: whether the averaged weights were taken out of a file that has others too.
      parameters: their number.
      config: the shape of the network.
      files: those that the tensors came from.
      dtype: of the parameters: the file's own if all are of one of float32, bfloat16 and float16, else float32.
    """

    layout: str
    ema: bool
    parameters: int
    config: DiTConfig
    files: tuple[Path, ...]
    dtype: str


def import_checkpoint(
    path: str | os.PathLike[str],
    *,
    num_heads: int | None = None,
    input_size: int | None = None,
    ema: bool = True,
    as_diffusers: bool = False,
    objective: str | None = None,
    flow_steps: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[FloatDiT, Imported]:
    """A float model from a checkpoint of another code base, told apart by content (:mod:`~.layouts` lists them).

    Args:
      path: a file, or a folder: a diffusers pipeline or its transformer, shards with their index, an Orbax checkpoint.
      num_heads: of attention, where neither the file nor the published sizes tell it.
      input_size: side of the image or latent, where the file does not tell it.
      ema: take averaged weights if there are any; False takes those that were being trained.
      as_diffusers: compute what diffusers computes (time frequencies over 127, MLP norm epsilon of its config) instead of what
        Meta's code, with which published weights were trained, computes from the same weights. For its folders only.
      objective: what the network predicts, ``noise`` or ``velocity``, where weights have the names of a DiT and nothing else
        tells that they are a flow's, such as a SiT without a discarded variance half.
      flow_steps: the number of equal Euler steps that a network made for a step size is to be sampled with: 128 by default for
        shortcut models, 1 for mean flows. 0 gives it the size 0 and any number of steps: the velocity itself of a mean flow.
      progress: called with the tensors read and their total.

    Returns:
      The model, on the default device, and what was found. Peak memory is the model plus its largest stacked parameter.

    Raises:
      Ptq4ditError: nothing readable at ``path``; an unknown layout, or one of another network; missing, unexpected or misshapen
        tensors (all named at once); NaN or infinity; a size that has to be given; an option that does not fit.
    """
    where = local_path(path)
    if where.is_dir() and (where / "transformer").is_dir():
        where = where / "transformer"
    file = open_tensors(where)
    layout, root, averaged = _find_layout(file, ema)
    view = {name.removeprefix(root): tensor for name, tensor in file.items() if name.startswith(root)}
    if not layout.entries:
        raise Ptq4ditError(
            f"The checkpoint {file.path} is {layout.name}, another network than DiT ({layout.differs}), which cannot be "
            "imported; docs/checkpoints.md lists what can."
        )
    config, schedule = read_config(file, view, layout, Given(num_heads, input_size, as_diffusers))
    schedule = find_schedule(file, view, layout, config, schedule, objective, flow_steps)
    _check_positions(file, view, layout, config)
    params, dtype = _read(file, view, layout, config, progress)
    if isinstance(schedule, FlowSchedule):
        params = fold_step_size(params, layout, config, schedule)
        params, config = drop_variance(params, config)
    model = FloatDiT(params=traverse_util.unflatten_dict(params, sep="/"), config=config, schedule=schedule)
    name = "SiT" if layout is META and isinstance(schedule, FlowSchedule) else layout.name
    return model, Imported(name, averaged, model.num_params, config, file.files, dtype)


def _find_layout(file: TensorFile, ema: bool) -> tuple[Layout, str, bool]:
    """The layout, the prefix of the names of the chosen weights, and whether they are averaged."""
    for layout in LAYOUTS:
        ends = layout.markers
        roots = [name.removesuffix(ends[0]) for name in file if name.endswith(ends[0])]
        roots = [root for root in roots if (not root or root[-1] == ".") and all(root + end in file for end in ends)]
        roots = [root for root in roots if not _OPTIMIZER.intersection(root.split("."))]
        if not roots:
            continue
        averaged = [root for root in roots if _EMA.intersection(root.split("."))]
        trained = [root for root in roots if root not in averaged]
        chosen = (averaged or trained) if ema else trained
        if not chosen:
            raise Ptq4ditError(f"The checkpoint {file.path} holds averaged (EMA) weights only; take them, with ema or --ema.")
        if len(chosen) > 1:
            names = ", ".join(root.rstrip(".") or "the top level" for root in chosen[:SHOWN])
            raise Ptq4ditError(
                f"The checkpoint {file.path} holds {len(chosen)} sets of weights, at {names}; save the wanted one alone."
            )
        return layout, chosen[0], chosen[0] in averaged
    known = ", ".join(layout.name for layout in LAYOUTS if layout.entries)
    raise Ptq4ditError(
        f"The checkpoint {file.path} is no DiT of a known layout ({known}); it holds {listed(sorted(file)[: SHOWN + 1])}."
    )


def _check_positions(file: TensorFile, view: View, layout: Layout, config: DiTConfig) -> None:
    """The stored table of positions must be the one that this package computes."""
    if layout.pos_embed is None or layout.pos_embed not in view:
        return
    tensor, table = view[layout.pos_embed], position_embedding(config)
    tolerance = 1e-4 if tensor.dtype.itemsize >= 4 else 1e-2
    if tensor.size != table.size or not np.allclose(
        tensor.read().astype(np.float32).reshape(table.shape), table, atol=tolerance
    ):
        raise Ptq4ditError(
            f"The {layout.pos_embed} in {file.path} is not the fixed sine-cosine table, so it is no DiT that can be imported."
        )


def _read(
    file: TensorFile, view: View, layout: Layout, config: DiTConfig, progress: Callable[[int, int], None] | None
) -> tuple[dict[str, Any], str]:
    """Our parameters by flat name, converted one tensor at a time, and their dtype."""
    names = [name for entry in layout.all_entries for name in names_of(entry, config.depth)]
    kinds = {view[name].dtype.name for name in names}
    dtype = kinds.pop() if len(kinds) == 1 and kinds <= set(FLOATS) else "float32"
    shapes, bad, done = our_shapes(config), [], 0

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
    for entry in layout.all_entries:

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
