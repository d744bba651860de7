"""Determines which tensors of a file are the network's: the layout, and one set of weights if a file has several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ptq4dit_jax.checkpoints.foreign.layouts import LAYOUTS, Layout, View
from ptq4dit_jax.checkpoints.foreign.lazy import Tensor, TensorFile
from ptq4dit_jax.checkpoints.foreign.names import is_average, is_optimizer, normal_name, normal_names, without_dots
from ptq4dit_jax.checkpoints.foreign.strangers import file_of, form_of
from ptq4dit_jax.errors import Ptq4ditError

#: How many names a sentence lists.
SHOWN = 8
_REMEDY = "name one with weights (ptq4dit convert --weights NAME)"


@dataclass(frozen=True)
class ParameterSet:
    """The weights that were chosen.

    Attributes:
      layout: the family of the checkpoint.
      name: the prefix of their names in the file, empty at the top level.
      averaged: whether they are averages over training.
      view: tensors by the names of the layout's table.
    """

    layout: Layout
    name: str
    averaged: bool
    view: View

    @property
    def words(self) -> str:
        kind = "averaged (EMA)" if self.averaged else "as saved"
        return f"{kind}, {self.name}" if self.name else kind


def listed(names: list[str]) -> str:
    """Lists the first names, and says how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(name[:80] for name in names[:SHOWN]) + more


def find_parameters(file: TensorFile, *, ema: bool, wanted: str | None) -> ParameterSet:
    """Chooses a set of weights.

    Args:
      file: the opened checkpoint.
      ema: take averaged weights if there are any.
      wanted: the prefix of the set to take, which overrides ``ema``.

    Raises:
      Ptq4ditError: no known layout; a set that does not exist; several sets between which nothing decides; averaged weights
        that exist and cannot be used.
    """
    names = normal_names(file)
    for layout in LAYOUTS:
        roots = _roots(layout, names)
        if not roots:
            continue
        if not layout.entries:
            raise Ptq4ditError(
                f"The checkpoint {file.path} is {layout.name}, another network than DiT ({layout.differs}), which cannot be "
                "imported; docs/checkpoints.md lists what can."
            )
        return _in_layout(file, layout, names, roots, ema, wanted)
    raise _no_layout(file)


def _no_layout(file: TensorFile) -> Ptq4ditError:
    if form := form_of([*file, *file.contents.dropped]):
        return Ptq4ditError(f"The checkpoint {file.path} cannot be imported as it is: {form}.")
    known = ", ".join(layout.name for layout in LAYOUTS if layout.entries)
    seems = f"; {what}" if (what := file_of(file)) else ""
    holds = listed(sorted(file)[: SHOWN + 1]) + file.contents.dropped_words()
    return Ptq4ditError(f"The checkpoint {file.path} is no DiT of a known layout ({known}); it holds {holds}{seems}.")


def _roots(layout: Layout, names: Mapping[str, str]) -> list[str]:
    """Returns the prefixes, each with its dot, that have all markers of a layout below them."""
    first, *others = layout.markers
    roots = [name.removesuffix(first) for name in names if name.endswith(first)]
    roots = [root for root in roots if (not root or root[-1] == ".") and all(root + end in names for end in others)]
    return [root for root in roots if not is_optimizer(root)]


def _in_layout(
    file: TensorFile, layout: Layout, names: Mapping[str, str], roots: list[str], ema: bool, wanted: str | None
) -> ParameterSet:
    views = {root: {name.removeprefix(root): file[names[name]] for name in _below(root, roots, names)} for root in roots}
    sets = [ParameterSet(layout, root.rstrip("."), is_average(root), view) for root, view in views.items()]
    if (flat := _flattened(file, layout, names, sets)) is not None:
        sets.append(flat)
    averaged, trained = [s for s in sets if s.averaged], [s for s in sets if not s.averaged]
    if wanted is not None:
        chosen = [s for s in sets if s.name == normal_name(wanted).strip(".")]
        if not chosen:
            raise Ptq4ditError(f"The checkpoint {file.path} has no weights named {wanted!r}; it has {_sets(sets)}.")
    else:
        chosen = (averaged or trained) if ema else trained
        if not chosen:
            raise Ptq4ditError(f"The checkpoint {file.path} holds averaged (EMA) weights only; take them, with ema or --ema.")
        if ema and not averaged and (unread := _unread_averages(file, names, sets)):
            raise Ptq4ditError(
                f"The checkpoint {file.path} holds averaged weights whose names do not match the network's ({listed(unread)}); "
                "save them under its names, or take those that were being trained, with ema=False or --model-weights."
            )
    if len(chosen) > 1:
        raise Ptq4ditError(f"The checkpoint {file.path} holds {len(chosen)} sets of weights, at {_sets(chosen)}; {_REMEDY}.")
    renamed = layout.renamed(chosen[0].view.keys())
    view = {renamed.get(name, name): tensor for name, tensor in chosen[0].view.items()}
    return replace(chosen[0], view=_of_one_device(file, layout, view))


def _below(root: str, roots: list[str], names: Iterable[str]) -> list[str]:
    """Returns the names below one root that are not below a longer one, nor in an optimizer's state."""
    inner = tuple(other for other in roots if other != root and other.startswith(root))
    below = [name for name in names if name.startswith(root) and not (inner and name.startswith(inner))]
    return [name for name in below if not is_optimizer(name.removeprefix(root).partition(".")[0])]


def _sets(sets: list[ParameterSet]) -> str:
    return ", ".join(s.name or "the top level" for s in sets[:SHOWN])


def _flattened(file: TensorFile, layout: Layout, names: Mapping[str, str], sets: list[ParameterSet]) -> ParameterSet | None:
    """Finds the average of the only set of weights, under names without dots."""
    if len(sets) != 1 or sets[0].averaged:
        return None
    root = f"{sets[0].name}." if sets[0].name else ""
    prefix, found = without_dots(names, [root + name for name in sets[0].view])
    if not found:
        return None
    view = {name.removeprefix(root): file[written] for name, written in found.items()}
    if layout.pos_embed is not None and layout.pos_embed in sets[0].view:  # a buffer
        view.setdefault(layout.pos_embed, sets[0].view[layout.pos_embed])
    return ParameterSet(layout, prefix, True, view)


def _unread_averages(file: TensorFile, names: Mapping[str, str], sets: list[ParameterSet]) -> list[str]:
    """Returns matrices below a prefix for averages that are in none of the sets nor in an optimizer's state."""
    roots = tuple(f"{s.name}." for s in sets if s.name)
    return [
        written
        for name, written in names.items()
        if "." in name
        and is_average(name.rpartition(".")[0])
        and not is_optimizer(name)
        and len(file[written].shape) >= 2
        and not (roots and name.startswith(roots))
    ]


def _of_one_device(file: TensorFile, layout: Layout, view: View) -> View:
    """Returns one copy of each tensor in a tree that JAX's ``pmap`` stored once per device; reading it raises if copies differ.

    Such a tree is recognized by an extra axis of the patch embedding's bias, and an equal leading axis of all tensors.
    """
    bias = next(entry.theirs[0] for entry in layout.entries if entry.ours == "patch_embed/bias")
    names = [name.replace("{i}", "0") for entry in layout.all_entries for name in entry.theirs]
    present = [view[name] for name in names if name in view]
    if bias not in view or len(view[bias].shape) != 2 or len({tensor.shape[:1] for tensor in present}) != 1:
        return view
    wanted = {name for name, tensor in view.items() if tensor.shape[:1] == view[bias].shape[:1]}
    return {name: _first_copy(file, name, tensor) if name in wanted else tensor for name, tensor in view.items()}


def _first_copy(file: TensorFile, name: str, tensor: Tensor) -> Tensor:
    def load() -> np.ndarray:
        copies = tensor.read()
        if any(not np.array_equal(copies[0], copy, equal_nan=True) for copy in copies[1:]):
            raise Ptq4ditError(
                f"The checkpoint {file.path} has {len(copies)} different copies of {name}, one per device; save one of them "
                "(flax.jax_utils.unreplicate)."
            )
        return copies[0]

    return Tensor(tensor.shape[1:], tensor.dtype, load)
