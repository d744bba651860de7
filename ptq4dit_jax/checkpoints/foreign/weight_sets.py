"""Determines which files of a folder form a checkpoint, and which of several checkpoints of the same weights to read.

A set is one file, or shards with or without their index. Sets with one stem hold the same weights in other formats or types. As
in diffusers, full precision takes precedence over a variant, and safetensors over other formats.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptq4dit_jax.checkpoints.foreign.kinds import kind_of
from ptq4dit_jax.documents import read_json
from ptq4dit_jax.edges import quoted
from ptq4dit_jax.errors import Ptq4ditError

_SHARD = re.compile(r"(?P<stem>.+?)-(?P<n>\d{1,6})-of-(?P<of>\d{1,6})(?P<variant>\.[^.]+)?(?P<ext>\.[^.]+)")
_INDEX = re.compile(r"(?P<name>.+)\.index(?P<variant>\.[^.]+)?\.json")
_FULL = ("fp32", "float32")
_PRECISION = re.compile(
    rf"(?P<stem>.+?)[._-](?P<variant>fp16|bf16|float16|bfloat16|half|fp8\w*|{'|'.join(_FULL)})", re.IGNORECASE
)
#: Names that diffusers, transformers and accelerate write. Their stems differ between formats; the rest is a variant.
_STANDARD = re.compile(
    r"(?P<stem>diffusion_pytorch_model|diffusion_flax_model|pytorch_model|flax_model|model)(?P<variant>\.[^.]+)?"
)
_SAME = {"diffusion_flax_model": "diffusion_pytorch_model", "pytorch_model": "model", "flax_model": "model"}
_FORMATS = ("safetensors", "torch", "msgpack", "pickle")
#: Files that trainers save beside the weights.
_STATE = re.compile(r"(optimizer|scheduler|scaler|sampler|random_states|rng_state|training_args|dataloader)([._-].*)?")
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack"}
#: Files that are never opened to see whether they hold weights.
_NEVER = frozenset(
    """
    .bmp .cfg .csv .gif .html .ipynb .jpeg .jpg .json .jsonl .log .md .mp4 .npy .npz .pdf .png .py .sh .svg .toml .txt
    .webp .yaml .yml
    """.split()
)
_SHOWN = 8


@dataclass(frozen=True)
class WeightSet:
    """Files that together are one checkpoint.

    Attributes:
      path: the file, the index of the shards, or the first shard where there is no index.
      kind: a result of :func:`~.kinds.kind_of`, such as ``index``; or ``shards`` where there is no index.
      files: the files with tensors, beside ``path``.
      stem, variant: the parts of the name.
      format: of the files with tensors.
      whole: whether all files exist and each is what its name says. Opening any other set reports what is wrong with it.
    """

    path: Path
    kind: str
    files: tuple[Path, ...]
    stem: str
    variant: str
    format: str
    whole: bool

    @property
    def full(self) -> bool:
        """Whether the weights are in full precision, judging by the name."""
        return self.variant == ""

    @property
    def rank(self) -> tuple[bool, int, int, bool]:
        precision = 0 if self.full else 1 if self.variant.lower() in _FULL else 2
        formats = _FORMATS.index(self.format) if self.format in _FORMATS else len(_FORMATS)
        return not self.whole, precision, formats, self.kind not in ("index", "shards")


def is_candidate(name: str) -> bool:
    """Whether a file of this name may be a checkpoint, so that its first bytes decide."""
    return not name.startswith(".") and Path(name).suffix.lower() not in _NEVER


def read_index(index: Path) -> dict[str, str]:
    """Reads the ``weight_map`` of an index such as ``model.safetensors.index.json``: file names by tensor names.

    Raises:
      Ptq4ditError: the JSON has another form or an impossible size, or names a file that is not beside the index.
    """
    content = read_json(index, "copy or download it again", what="index of shards")
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or any(isinstance(file, (dict, list)) for file in places.values()):
        raise Ptq4ditError(
            f"The index {index} is no checkpoint: a JSON file must be an index with a weight_map of names to files."
        )
    places = {name: str(file) for name, file in places.items()}
    if odd := [file for file in places.values() if Path(file).name != file or file in ("", ".", "..") or "\0" in file]:
        raise Ptq4ditError(
            f"The index {index} names the file {quoted(odd[0], 80)}, which is not beside it; copy or download it again."
        )
    return places


def index_set(index: Path) -> WeightSet:
    """Returns the set of an index and its shards; raises as :func:`read_index` does."""
    files = tuple(index.with_name(file) for file in sorted(set(read_index(index).values())))
    kinds = {_kind(file) for file in files}
    match = _INDEX.fullmatch(index.name)
    name = match["name"] if match else index.stem
    stem, variant = _split(name[: -len(Path(name).suffix)] if Path(name).suffix in _WEIGHTS else name)
    if match and match["variant"]:
        variant = match["variant"][1:]
    whole = bool(files) and not kinds.intersection(("", "index"))
    return WeightSet(index, "index", files, stem, variant, min(kinds, default="", key=_format_rank), whole)


def weight_sets(files: Sequence[Path]) -> list[WeightSet]:
    """Returns the sets among the files of a folder, sorted by name. Files of other kinds are left out. A file with the name of
    weights but other content is a set that is not whole."""
    sets: list[WeightSet] = []
    shards: dict[tuple[str, str, str, int], dict[int, Path]] = defaultdict(dict)
    taken: set[Path] = set()
    for index in files:
        if not index.name.startswith(".") and _INDEX.fullmatch(index.name):
            try:
                found = index_set(index)
            except (Ptq4ditError, OSError):
                # Indices of other things exist too. An unreadable one is opened, and reported, if there is no other set.
                stem, variant = _split(index.name.partition(".")[0])
                found = WeightSet(index, "index", (), stem, variant, "", False)
            sets.append(found)
            taken.update(found.files)
    indexed = {(found.stem, found.variant) for found in sets}
    starts = tuple(found.path.name.partition(".")[0] + "-" for found in sets)
    for file in files:
        if file in taken or not is_candidate(file.name) or file.name.startswith(starts):
            continue
        if match := _SHARD.fullmatch(file.name):
            stem, variant = _split(match["stem"])
            variant = match["variant"][1:] if match["variant"] else variant
            if (stem, variant) not in indexed and _kind(file) not in ("", "index"):
                shards[stem, variant, match["ext"], int(match["of"])][int(match["n"])] = file
            continue
        kind = _kind(file)
        if kind in ("", "index"):
            if file.suffix not in _WEIGHTS:
                continue
            kind = ""
        sets.append(WeightSet(file, kind, (file,), *_split(file.stem if file.suffix else file.name), kind, bool(kind)))
    for (stem, variant, _, of), parts in shards.items():
        ordered = tuple(parts[n] for n in sorted(parts))
        whole = len(parts) == of and {*parts} in ({*range(of)}, {*range(1, of + 1)})
        sets.append(WeightSet(ordered[0], "shards", ordered, stem, variant, _kind(ordered[0]), whole))
    return sorted(sets, key=lambda found: found.path.name)


def choose(folder: Path, sets: Sequence[WeightSet]) -> tuple[WeightSet, tuple[str, ...]]:
    """Returns the set to read, and what was decided, in words.

    Raises:
      Ptq4ditError: the sets are different checkpoints; they are listed.
    """
    sets = [found for found in sets if found.whole] or sets
    sets = [found for found in sets if not _STATE.fullmatch(found.stem)] or sets
    diffusers = [found for found in sets if found.stem == "diffusion_pytorch_model"]
    group = diffusers or sets
    best = min(group, key=lambda found: found.rank)
    if any(found is not best and _rivals(found, best) for found in group):
        raise Ptq4ditError(
            f"The folder {folder} must hold one checkpoint, and holds {listed_paths(found.path for found in group)}; "
            "pass the file itself."
        )
    others = [found for found in sets if found is not best]
    if not others:
        return best, ()
    why = "full precision, beside " if best.full and all(not found.full for found in others) else "beside "
    return best, (f"{best.path.name}, {why}{listed_paths(found.path for found in others)}",)


def _rivals(one: WeightSet, other: WeightSet) -> bool:
    """Whether nothing decides between two sets."""
    if one.stem != other.stem or one.rank == other.rank:
        return True
    return one.variant != other.variant and one.rank[1] == other.rank[1]


def listed_paths(paths: Iterable[Path]) -> str:
    """Lists the first names, and says how many more there are."""
    names = [path.name for path in paths]
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest


def _kind(file: Path) -> str:
    """Returns the kind of a file; "" if it cannot be a checkpoint, does not exist or cannot be read."""
    try:
        return kind_of(file) if file.is_file() else ""
    except (Ptq4ditError, OSError):
        return ""


def _format_rank(kind: str) -> int:
    return _FORMATS.index(kind) if kind in _FORMATS else len(_FORMATS)


def _split(stem: str) -> tuple[str, str]:
    """Splits a name without its ending into stem and variant, which is ``fp16`` in ``diffusion_pytorch_model.fp16``."""
    if (match := _STANDARD.fullmatch(stem)) is None and (match := _PRECISION.fullmatch(stem)) is None:
        return stem, ""
    return _SAME.get(match["stem"], match["stem"]), (match["variant"] or "").lstrip(".")
