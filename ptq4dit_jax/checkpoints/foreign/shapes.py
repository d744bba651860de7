"""The shape of a network, read off the names and shapes in a file, and everything about them that does not fit."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ptq4dit_jax.checkpoints.float_dit import FLOATS, expected_arrays, settings_from_json
from ptq4dit_jax.checkpoints.foreign.layouts import DIFFUSERS, Entry, Layout, View
from ptq4dit_jax.checkpoints.foreign.tensors import TensorFile
from ptq4dit_jax.dit import PRESETS, DiTConfig
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.schedules import NoiseSchedule, Schedule

_MAX_BLOCKS, SHOWN = 1000, 8


@dataclass(frozen=True)
class Given:
    """What the user says about a checkpoint: sizes that it may not tell, and whether to compute what diffusers computes."""

    num_heads: int | None = None
    input_size: int | None = None
    as_diffusers: bool = False


def read_config(file: TensorFile, view: View, layout: Layout, given: Given) -> tuple[DiTConfig, Schedule]:
    """The configuration of the network as the file has it, and the schedule that its layout and folder tell.

    Raises:
      Ptq4ditError: tensors that are missing, unexpected or of another shape than the rest asks for, all named at once; a size
        that has to be given, or contradicts the file.
    """
    facts, faults, depth = _folder_facts(file, layout), _Faults(), _depth(view, layout)
    _check_names(view, layout, depth, faults)
    config = _config(file, view, layout, depth, facts, faults, given)
    _check_shapes(view, layout, config, faults)
    faults.raise_any(file.path, layout)
    return config, facts.schedule or layout.schedule


def listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(name[:80] for name in names[:SHOWN]) + more


class _Faults:
    """What is wrong with the tensors of a file, raised together as one sentence."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.misshapen: list[str] = []

    def raise_any(self, path: Path, layout: Layout) -> None:
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "of the wrong shape or type": self.misshapen}
        if found := [f"{kind}: {listed(names)}" for kind, names in kinds.items() if names]:
            raise Ptq4ditError(f"The file {path} is no complete {layout.name} checkpoint; {'; '.join(found)}.")


@dataclass(frozen=True)
class _FolderFacts:
    """What JSON files beside the weights tell."""

    num_heads: int | None = None
    input_size: int | None = None
    norm_eps: float = 1e-5
    schedule: NoiseSchedule | None = None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise Ptq4ditError(f"The file {path} is not valid JSON; copy or download it again.") from error
    return content if isinstance(content, dict) else {}


def _folder_facts(file: TensorFile, layout: Layout) -> _FolderFacts:
    """Of a diffusers folder: ``config.json`` beside the weights, and the scheduler's in a pipeline."""
    if layout is not DIFFUSERS:
        return _FolderFacts()
    folder = file.files[0].parent
    config, scheduler = _read_json(folder / "config.json"), _read_json(folder.parent / "scheduler" / "scheduler_config.json")
    plain = {
        "activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero", "attention_bias": True,
        "norm_elementwise_affine": False,
    }  # fmt: skip
    for key, value in plain.items():
        if config.get(key, value) != value:
            raise Ptq4ditError(
                f"The file {folder / 'config.json'} has {key} = {config[key]!r}, which is no DiT; it must be {value!r}."
            )
    for key, value in {"beta_schedule": "linear", "prediction_type": "epsilon"}.items():
        if scheduler.get(key, value) != value:
            raise Ptq4ditError(f"The pipeline in {folder.parent} has {key} = {scheduler[key]!r}; only {value!r} is supported.")
    try:
        fields = {"num_timesteps": "num_train_timesteps", "beta_start": "beta_start", "beta_end": "beta_end"}
        given = {ours: scheduler[theirs] for ours, theirs in fields.items() if theirs in scheduler}
        schedule = settings_from_json(NoiseSchedule, given)
        heads, side = config.get("num_attention_heads"), config.get("sample_size")
        return _FolderFacts(
            None if heads is None else int(heads),
            None if side is None else int(side),
            float(config.get("norm_eps", 1e-5)),
            schedule,
        )
    except (TypeError, ValueError) as error:
        raise Ptq4ditError(
            f"The file {folder / 'config.json'} holds a size that is no number ({error}); copy it again."
        ) from error


def names_of(entry: Entry, depth: int) -> list[str]:
    if "{i}" not in entry.theirs[0]:
        return list(entry.theirs)
    return [name.replace("{i}", str(i)) for i in range(depth) for name in entry.theirs]


def _depth(view: View, layout: Layout) -> int:
    pattern = re.compile(re.escape(layout.block).replace(r"\{i\}", r"(\d{1,6})"))
    return 1 + max(int(match[1]) for name in view if (match := pattern.match(name)))


def _check_names(view: View, layout: Layout, depth: int, faults: _Faults) -> None:
    if depth > _MAX_BLOCKS:
        faults.unexpected.append(layout.block.replace("{i}", str(depth - 1)) + "*")
        return
    expected = {name for entry in layout.all_entries for name in names_of(entry, depth)}
    ignored = [re.compile(pattern) for pattern in layout.ignored]
    faults.missing = sorted(expected - view.keys(), key=by_number)
    extra = view.keys() - expected - {layout.pos_embed}
    faults.unexpected = sorted((name for name in extra if not any(p.fullmatch(name) for p in ignored)), key=by_number)


def by_number(name: str) -> list[tuple[int, str]]:
    """Sorts block 10 behind block 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _config(
    file: TensorFile,
    view: View,
    layout: Layout,
    depth: int,
    facts: _FolderFacts,
    faults: _Faults,
    given: Given,
) -> DiTConfig:
    """The shape of the network, read off the shapes of its tensors."""
    sizes: dict[str, int] = {}
    for size, (name, axis) in layout.sizes.items():
        if name in view and len(view[name].shape) > axis and view[name].shape[axis]:
            sizes[size] = view[name].shape[axis]
        elif name in view:
            faults.misshapen.append(f"{name} {view[name].shape}")
    needed = set(layout.sizes) - {"tokens"} - set(sizes)
    if needed or depth > _MAX_BLOCKS:
        faults.raise_any(file.path, layout)
    hidden, patch, channels = sizes["hidden"], sizes["patch"], sizes["channels"]
    outputs = sizes["outputs"] // patch**2
    if sizes["outputs"] % patch**2 or outputs not in (channels, 2 * channels):
        faults.misshapen.append(f"{layout.sizes['outputs'][0]} {view[layout.sizes['outputs'][0]].shape}")
        faults.raise_any(file.path, layout)
    ratio = sizes["mlp"] / hidden
    if int(hidden * ratio) != sizes["mlp"]:
        ratio = (sizes["mlp"] + 0.5) / hidden
    # The table's last row is "no class", unless it has one row, or ImageNet's 1000 and no more.
    null_class = sizes["rows"] not in (1, 1000)
    theirs = given.as_diffusers and layout is DIFFUSERS
    settings: dict[str, Any] = {"freq_shift": 1.0, "mlp_norm_eps": facts.norm_eps} if theirs else {}
    return DiTConfig(
        input_size=_input_size(file, sizes, facts.input_size, given.input_size),
        patch_size=patch,
        in_channels=channels,
        hidden_size=hidden,
        depth=depth,
        num_heads=_num_heads(file, depth, hidden, sizes.get("heads") or facts.num_heads, given.num_heads),
        mlp_ratio=ratio,
        num_classes=sizes["rows"] - null_class,
        null_class=null_class,
        learn_sigma=outputs == 2 * channels,
        frequency_size=sizes["frequencies"],
        **settings,
    )


def _input_size(file: TensorFile, sizes: Mapping[str, int], told: int | None, given: int | None) -> int:
    if "tokens" in sizes:
        side = math.isqrt(sizes["tokens"])
        if side * side != sizes["tokens"]:
            raise Ptq4ditError(
                f"The checkpoint {file.path} is a DiT of {sizes['tokens']} tokens; only square images are supported."
            )
        told = side * sizes["patch"]
    return _agreed(file, "input size", told, given, "convert it with input_size (ptq4dit convert --input-size), such as 32")


def _num_heads(file: TensorFile, depth: int, hidden: int, told: int | None, given: int | None) -> int:
    if told is None and given is None:
        presets = [DiTConfig.preset(name) for name in PRESETS]
        told = next((c.num_heads for c in presets if (c.depth, c.hidden_size) == (depth, hidden)), None)
    what = f"number of heads (depth {depth}, width {hidden})"
    return _agreed(file, what, told, given, "convert it with num_heads (ptq4dit convert --num-heads)")


def _agreed(file: TensorFile, what: str, told: int | None, given: int | None, remedy: str) -> int:
    """What the file tells or the user says; both must not differ, one must be there."""
    if told is not None and given is not None and told != given:
        raise Ptq4ditError(f"The checkpoint {file.path} has {told} as its {what}, not {given}; leave the option out.")
    if (value := given if told is None else told) is None:
        raise Ptq4ditError(f"The checkpoint {file.path} does not tell its {what}; {remedy}.")
    return value


def _parts(entry: Entry, config: DiTConfig, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes that their tensors of an entry must have, for our ``shape`` without the depth axis."""
    part = np.broadcast_to(np.float32(0), (*shape[:-1], shape[-1] // len(entry.theirs)))
    return [transform.theirs(part, config).shape for _, transform in entry.parts]


def our_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of our parameters, those of blocks without the depth axis, and of an embedder of step sizes."""
    shapes = {name: leaf.shape for name, leaf in expected_arrays(config, "float32").items()}
    steps = {name.replace("time_", "step_"): shape for name, shape in shapes.items() if name.startswith("time_")}
    return {name: shape[1:] if name.startswith("blocks/") else shape for name, shape in (shapes | steps).items()}


def _check_shapes(view: View, layout: Layout, config: DiTConfig, faults: _Faults) -> None:
    shapes = our_shapes(config)
    for entry in layout.all_entries:
        wanted = _parts(entry, config, shapes[entry.ours])
        for name, shape in zip(names_of(entry, config.depth), wanted * config.depth, strict=False):
            if name in view and view[name].shape != shape:
                faults.misshapen.append(f"{name} {view[name].shape} instead of {shape}")
            elif name in view and view[name].dtype.name not in (*FLOATS, "float64"):
                faults.misshapen.append(f"{name} of {view[name].dtype.name}")
