"""Reads the shape of a network off the names and shapes in a file, and reports everything about them that does not fit."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ptq4dit_jax.checkpoints.float_dit import FLOATS, expected_arrays
from ptq4dit_jax.checkpoints.foreign.evidence import Evidence, Said
from ptq4dit_jax.checkpoints.foreign.layouts import Entry, Layout, View
from ptq4dit_jax.checkpoints.foreign.lazy import Tensor, TensorFile
from ptq4dit_jax.checkpoints.foreign.objectives import said_objective
from ptq4dit_jax.checkpoints.foreign.options import GivenShape
from ptq4dit_jax.checkpoints.foreign.parameter_sets import listed
from ptq4dit_jax.checkpoints.foreign.strangers import form_of, parts_of_another
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.networks.dit import PRESETS, DiTConfig

_MAX_BLOCKS = 1000


def read_config(
    file: TensorFile, view: View, layout: Layout, evidence: Evidence, given: GivenShape, norm_eps: float | None
) -> tuple[DiTConfig, View]:
    """Returns the configuration of the network, and the tensors with zeros for biases that it was built without.

    Args:
      file: the opened checkpoint.
      view: the tensors by the layout's names.
      layout: the family of the checkpoint.
      evidence: what the checkpoint says besides its tensors; guesses are noted there.
      given: the user's options.
      norm_eps: of the norm before the MLP, if it is not Meta's.

    Raises:
      Ptq4ditError: tensors that are missing, unexpected or of another shape than the rest requires, all named at once; a size
        that must be given, or contradicts the file.
    """
    faults, depth = _Faults(), _depth(view, layout)
    bias_free = _bias_free(view, layout, depth) if depth <= _MAX_BLOCKS else []
    _check_names(view, layout, depth, bias_free, faults)
    config = _config(file, view, layout, depth, evidence, faults, given, norm_eps)
    _check_shapes(view, layout, config, faults)
    faults.raise_any(file, layout)
    zeros: dict[str, Tensor] = {}
    for entry in bias_free:
        evidence.notes.append(f"No block has {entry.theirs[0].replace('{i}.', '*.')}; it is taken to be zero.")
        shapes = _parts(entry, config, our_shapes(layout, config)[entry.ours])
        zeros |= {name: _zeros(shape) for name, shape in zip(entry.names(depth), shapes * depth, strict=True)}
    return config, {**view, **zeros}


def _zeros(shape: tuple[int, ...]) -> Tensor:
    return Tensor(shape, np.dtype(np.float32), lambda: np.zeros(shape, np.float32))


class _Faults:
    """What is wrong with the tensors of a file, raised together as one sentence."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.misshapen: list[str] = []

    def raise_any(self, file: TensorFile, layout: Layout) -> None:
        """Raises one sentence. Tensors that a DiT lacks mean another network; only missing ones mean damage."""
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "of the wrong shape or type": self.misshapen}
        found = "; ".join(f"{kind}: {listed(names)}" for kind, names in kinds.items() if names)
        if not found:
            return
        found += file.contents.dropped_words()
        if form := form_of([*self.unexpected, *file.contents.dropped]):
            raise Ptq4ditError(f"The file {file.path} cannot be imported as it is: {form} ({found}).")
        if self.unexpected:
            parts = parts_of_another(self.unexpected)
            has = f"it has {', '.join(parts)}, which a DiT has not" if parts else "it has tensors that a DiT has not"
            raise Ptq4ditError(f"The file {file.path} is another network than a {layout.name}: {has} ({found}).")
        if self.missing:
            raise Ptq4ditError(
                f"The file {file.path} is no complete {layout.name} checkpoint; {found}; copy or download it again."
            )
        integers = [name for name in self.misshapen if re.search(r" of (u?int|float8)", name)]
        quantized = " (they look quantized already: import the float weights)" if integers else ""
        raise Ptq4ditError(
            f"The file {file.path} is another network than a {layout.name}, or two of them mixed; {found}{quantized}."
        )


def _depth(view: View, layout: Layout) -> int:
    pattern = re.compile(re.escape(layout.block).replace(r"\{i\}", r"(\d{1,6})"))
    return 1 + max(int(match[1]) for name in view if (match := pattern.match(name)))


def _bias_free(view: View, layout: Layout, depth: int) -> list[Entry]:
    """Returns the biases that no block has although all have the weights: those of linear layers built without bias."""
    entries = [entry for entry in layout.entries if entry.stacked and entry.ours.endswith("/bias")]
    kernels = {entry.ours.removesuffix("/kernel"): entry for entry in layout.entries if entry.ours.endswith("/kernel")}
    return [
        entry
        for entry in entries
        if not any(name in view for name in entry.names(depth))
        and all(name in view for name in kernels[entry.ours.removesuffix("/bias")].names(depth))
    ]


def _check_names(view: View, layout: Layout, depth: int, bias_free: list[Entry], faults: _Faults) -> None:
    if depth > _MAX_BLOCKS:
        faults.unexpected.append(layout.block.replace("{i}", str(depth - 1)) + "*")
        return
    entries = [entry for entry in layout.all_entries if entry not in bias_free and not _absent(view, entry, depth)]
    expected = {name for entry in entries for name in entry.names(depth)}
    ignored = [re.compile(pattern) for pattern in layout.ignored]
    faults.missing = sorted(expected - view.keys(), key=by_number)
    apart = {layout.pos_embed, layout.time_basis}
    extra = {name for name in view.keys() - expected - apart if view[name].shape and not _BUFFER.fullmatch(name)}
    faults.unexpected = sorted((name for name in extra if not any(p.fullmatch(name) for p in ignored)), key=by_number)


#: Tables of a schedule that are saved with networks. Other tensors that are no weights have no axes.
_BUFFER = re.compile(
    r"(.*\.)?((sqrt_|log_)?(one_minus_)?(recip_|recipm1_)?alphas?_cumprod\w*|betas|sqrt_\w+|log_one_minus\w+|posterior_\w+|"
    r"lvlb_weights|logvar|timesteps|sigmas)"
)


def _absent(view: View, entry: Entry, depth: int) -> bool:
    """Whether the network lacks an entry: an optional one, or the table of labels of an unconditional network."""
    may_lack = entry.optional or entry.ours == "label_embed/embedding"
    return may_lack and not any(name in view for name in entry.names(depth))


def by_number(name: str) -> list[tuple[int, str]]:
    """A sort key that puts block 10 after block 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _config(
    file: TensorFile,
    view: View,
    layout: Layout,
    depth: int,
    evidence: Evidence,
    faults: _Faults,
    given: GivenShape,
    norm_eps: float | None,
) -> DiTConfig:
    """Reads the shape of the network off the shapes of its tensors."""
    sizes: dict[str, int] = {}
    for size, (name, axis) in layout.sizes.items():
        if size == "tokens" and name in view and len(view[name].shape) == 2:
            axis = 0
        if name in view and len(view[name].shape) > axis and view[name].shape[axis]:
            sizes[size] = view[name].shape[axis]
        elif name in view:
            faults.misshapen.append(f"{name} {view[name].shape}")
    optional = {"tokens", "head gain"} | ({"rows"} if layout.sizes["rows"][0] not in view else set())
    needed = set(layout.sizes) - optional - set(sizes)
    if needed or depth > _MAX_BLOCKS:
        faults.raise_any(file, layout)
    hidden, patch, channels = sizes["hidden"], sizes["patch"], sizes["channels"]
    outputs = sizes["outputs"] // patch**2
    if sizes["outputs"] % patch**2 or outputs not in (channels, 2 * channels):
        faults.misshapen.append(f"{layout.sizes['outputs'][0]} {view[layout.sizes['outputs'][0]].shape}")
        faults.raise_any(file, layout)
    ratio = layout.network.mlp_ratio_of(hidden, sizes["mlp"])
    told = {
        "width": hidden,
        "depth": depth,
        "patch size": patch,
        "channels": channels,
        "MLP ratio": ratio,
        "output channels": outputs,
        "learned variance": outputs == 2 * channels,
        "time frequencies": sizes["frequencies"],
    }
    settings = layout.network.traits(sizes)
    told["norms without a shift"] = not settings.get("shifts", True)
    told["norms with a shift"] = settings.get("shifts", True)
    told["norms of queries and keys"] = settings.get("qk_norm", False)
    told["frequencies of its own"] = layout.time_basis in view
    _check_sizes(evidence, layout, told)
    classes, null_class = _classes(file, evidence, sizes.get("rows", 0), given)
    heads = sizes.get("heads")
    if (width := sizes.get("head_width")) and hidden % width == 0:
        heads = hidden // width
    settings |= {} if norm_eps is None else {"freq_shift": 1.0, "mlp_norm_eps": norm_eps}
    return layout.network(
        input_size=_input_size(file, evidence, sizes, given.input_size),
        patch_size=patch,
        in_channels=channels,
        hidden_size=hidden,
        depth=depth,
        num_heads=_num_heads(file, evidence, depth, hidden, heads, given.num_heads),
        mlp_ratio=ratio,
        num_classes=classes,
        null_class=null_class,
        learn_sigma=outputs == 2 * channels,
        frequency_size=sizes["frequencies"],
        **settings,
    )


def _check_sizes(evidence: Evidence, layout: Layout, told: Mapping[str, Any]) -> None:
    """Raises if a configuration contradicts the tensors."""
    objective = said_objective(evidence, layout)
    flow = objective is not None and objective.value == "velocity"
    for what, value in told.items():
        said = evidence.said.get(what)
        if said is None or said.value == value:
            continue
        if what == "MLP ratio" and abs(said.value - value) * told["width"] < 1:
            continue
        # A flow's variance half is dropped, and configurations of flows count channels without it.
        if what in ("output channels", "learned variance") and (flow or not layout.schedule_is_noise):
            continue
        raise evidence.contradiction(said, f"its tensors have the {what} {_short(value)}")
    name = evidence.said.get("published name")
    if name is not None:
        _, family, preset, patch = name.value
        if family.replace("_", "") != layout.family and family.replace("_", "") in _OTHER_FAMILIES:
            raise Ptq4ditError(
                f"The checkpoint {evidence.path} says {name}, a network of the family {family!r} and not a DiT; leave "
                f"it out with ignore (--ignore {name.key}) only if you know better."
            )
        sizes = (told["depth"], told["width"], told["patch size"])
        published = DiTConfig.preset(preset) if preset else None
        if patch != told["patch size"] or (published and (published.depth, published.hidden_size, patch) != sizes):
            raise evidence.contradiction(name, f"its tensors have depth {sizes[0]}, width {sizes[1]} and patch size {sizes[2]}")


#: Families other than DiT whose tensors may look like a DiT's.
_OTHER_FAMILIES = ("lightningdit", "uvit", "mdt", "mdtv2", "maskdit", "mmdit", "pixart", "dim", "dimr", "ditdh", "jit")


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _classes(file: TensorFile, evidence: Evidence, rows: int, given: GivenShape) -> tuple[int, bool]:
    """Returns the number of classes, and whether one more row of the table means "no class"."""
    said, dropout = evidence.said.get("classes"), evidence.said.get("dropout of labels")
    if rows == 0:
        if given.classes or given.null_class:
            raise Ptq4ditError(
                f"The checkpoint {file.path} has no table of labels, so it has no classes; leave the option out."
            )
        if said is not None and said.value:
            raise evidence.contradiction(said, "it has no table of labels")
        evidence.notes.append("There is no table of labels: the network is unconditional.")
        return 0, False
    if given.classes is not None and said is not None and given.classes != said.value:
        raise evidence.contradiction(said, f"you say {given.classes} classes")
    null, told = given.null_class, evidence.said.get("null class")
    if told is not None and (dropout is None or dropout.value > 0) and null is None:
        null = told.value
    if dropout is not None:
        if null is not None and null != (dropout.value > 0):
            raise evidence.contradiction(dropout, f"you say that it has {'a' if null else 'no'} null class")
        null = dropout.value > 0
    classes = given.classes if given.classes is not None else evidence.value("classes")
    if (classes, rows) == (0, 1):  # one row, which all images share
        return 1, False
    if classes is not None:
        if rows not in (classes, classes + 1) or (null is not None and rows != classes + null):
            first: Said | str = f"you say {classes} classes" if said is None else said
            extra = (
                ""
                if null is None
                else f" {'with' if null else 'without'} a null class" + (f", as {dropout} says" if dropout else "")
            )
            raise evidence.contradiction(
                first, f"its table of labels has {rows} rows, which cannot be {classes} classes{extra}"
            )
        return classes, rows == classes + 1
    if null is not None:
        if rows - null < 1:
            raise Ptq4ditError(
                f"The checkpoint {file.path} has one row in its table of labels, which cannot be a null class alone."
            )
        return rows - null, null
    # The table's last row is "no class", unless it has one row, or ImageNet's 1000 and no more.
    null = rows not in (1, 1000)
    kind = f"{rows - null} classes and a null class" if null else f"{rows} classes and no null class"
    evidence.guess(
        f"the {rows} rows of the table of labels are {kind}", "classes (--classes N, --null-class or --no-null-class)"
    )
    return rows - null, null


def _input_size(file: TensorFile, evidence: Evidence, sizes: Mapping[str, int], given: int | None) -> int:
    said, image = evidence.said.get("input size"), evidence.said.get("image size")
    remedy = "convert it with input_size (ptq4dit convert --input-size), such as 32"
    told, patch = None, sizes["patch"]
    if "tokens" in sizes:
        side = math.isqrt(sizes["tokens"])
        if side * side != sizes["tokens"]:
            raise Ptq4ditError(
                f"The checkpoint {file.path} is a DiT of {sizes['tokens']} tokens; only square images are supported."
            )
        told = side * patch
        if said is not None and said.value != told:
            raise evidence.contradiction(said, f"its positions are those of an input of {told} x {told}")
    elif said is not None:
        told = said.value
    elif image is not None and given is None:
        told = image.value if sizes["channels"] in (1, 3) else image.value // 8
        how = "pixels" if told == image.value else "latents of an eighth of it"
        evidence.guess(f"{image.source} = {image.value} is the size of {how}: {told}", "input_size (--input-size)")
    size = _agreed(file, "input size", told, given, remedy)
    if image is not None and image.value not in [size * factor for factor in (1, 2, 4, 8, 16, 32, 64)]:
        evidence.notes.append(f"{image} is no multiple of the input of {size} x {size}; see that the size is right.")
    return size


def _num_heads(file: TensorFile, evidence: Evidence, depth: int, hidden: int, told: int | None, given: int | None) -> int:
    heads, width = evidence.said.get("number of heads"), evidence.said.get("width of a head")
    published = evidence.said.get("published name")
    what = f"number of heads (depth {depth}, width {hidden})"
    claims: list[tuple[Said | str, int]] = [] if told is None else [("its tensors are of that many heads", told)]
    claims += [(heads, heads.value)] if heads else []
    if width and (not width.value or hidden % width.value):
        raise evidence.contradiction(width, f"its width {hidden} is no multiple of that")
    claims += [(width, hidden // width.value)] if width else []
    if published and published.value.preset:
        claims.append((published, DiTConfig.preset(published.value.preset).num_heads))
    for said, count in claims[1:]:
        if count != claims[0][1]:
            raise evidence.contradiction(claims[0][0], said)
    told = claims[0][1] if claims else None
    if told is None and given is None:
        presets = [DiTConfig.preset(name) for name in PRESETS]
        told = next((c.num_heads for c in presets if (c.depth, c.hidden_size) == (depth, hidden)), None)
        if told is not None:
            size = f"depth {depth} and width {hidden}"
            evidence.guess(f"{told} heads, as the published DiT of {size} has", "num_heads (--num-heads)")
    return _agreed(file, what, told, given, "convert it with num_heads (ptq4dit convert --num-heads)")


def _agreed(file: TensorFile, what: str, told: int | None, given: int | None, remedy: str) -> int:
    """Returns what the file or the user says. They must not differ, and at least one must say something."""
    if told is not None and given is not None and told != given:
        raise Ptq4ditError(f"The checkpoint {file.path} has {told} as its {what}, not {given}; leave the option out.")
    if (value := given if told is None else told) is None:
        raise Ptq4ditError(f"The checkpoint {file.path} does not tell its {what}; {remedy}.")
    return value


def _parts(entry: Entry, config: DiTConfig, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Returns the shapes that an entry's tensors in the file must have, for our ``shape`` without the depth axis."""
    part = np.broadcast_to(np.float32(0), (*shape[:-1], shape[-1] // len(entry.theirs)))
    return [transform.theirs(part, config).shape for _, transform in entry.parts]


def our_shapes(layout: Layout, config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of our parameters, those of blocks without the depth axis.

    Parameters that an import folds into others are among them: an embedder of step sizes, and gains of norms.
    """
    shapes = {name: leaf.shape for name, leaf in expected_arrays(config, "float32").items()}
    steps = {name.replace("time_", "step_"): shape for name, shape in shapes.items() if name.startswith("time_")}
    inner = {name: shape[1:] if name.startswith("blocks/") else shape for name, shape in (shapes | steps).items()}
    return inner | {gain.entry.ours: (config.hidden_size,) for gain in layout.gains}


def _check_shapes(view: View, layout: Layout, config: DiTConfig, faults: _Faults) -> None:
    shapes = our_shapes(layout, config)
    for entry in layout.all_entries:
        if entry.ours not in shapes:  # the table of labels of an unconditional network
            continue
        wanted = _parts(entry, config, shapes[entry.ours])
        for name, shape in zip(entry.names(config.depth), wanted * config.depth, strict=False):
            if name in view and view[name].shape != shape:
                faults.misshapen.append(f"{name} {view[name].shape} instead of {shape}")
            elif name in view and view[name].dtype.name not in (*FLOATS, "float64"):
                faults.misshapen.append(f"{name} of {view[name].dtype.name}")
            elif name not in view and entry.optional:  # some networks of its kind have it, and some do not
                faults.missing.append(name)
