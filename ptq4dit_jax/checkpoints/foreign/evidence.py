"""What a checkpoint says about itself besides its tensors, collected from every place where training code records it.

Sources are the arguments inside a file (``args`` of a training script, Lightning's ``hyper_parameters``, a ``ConfigDict`` in a
pickle; also a command line or JSON as text), the metadata of safetensors, and JSON or YAML files beside the weights.
:mod:`~.keys` says what each key means. Unknown keys are reported, never silently skipped. Sources that contradict each other
are refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptq4dit_jax.checkpoints.foreign.arguments import spelled_out
from ptq4dit_jax.checkpoints.foreign.keys import HARMLESS, IMAGE_KEYS, KEYS, MUST_BE, SUSPECT, ZERO_SNR, Unfit, Unread
from ptq4dit_jax.checkpoints.foreign.lazy import Plain, TensorFile, flatten
from ptq4dit_jax.checkpoints.foreign.names import is_optimizer, parts_of
from ptq4dit_jax.checkpoints.foreign.pickle_machine import inert_children
from ptq4dit_jax.documents import MAX_SETTINGS, read_json, read_yaml
from ptq4dit_jax.errors import Ptq4ditError

#: Names of configuration files beside the weights. A file named like the weights counts too.
CONFIG_FILES = tuple(
    f"{stem}.{end}"
    for stem in ("config", "args", "hparams", "model_config", "options", "metadata")
    for end in ("json", "yaml", "yml")
)
#: Folders of checkpoints; the run writes its configuration above them.
_STEPS = re.compile(r"(checkpoints?|ckpts?|models?|weights|(step|epoch|iter|checkpoint)[-_]?)?\d*")
#: Parts of names that configuration libraries add: OmegaConf, ml_collections.
_INNER = {"_content", "_val", "_fields", "_store", "_metadata"}
#: Words in the names of containers of settings, and of sections that concern something other than the network.
_SETTINGS = frozenset(
    """
    args arg config configs cfg conf hparams hyper hyperparameters options opts opt settings kwargs metadata flags hp
    meta spec diffusion
    """.split()
)
_ELSEWHERE = frozenset(
    """
    vae autoencoder tokenizer stage encoder repa optimizer optim lr dataset dataloader data ema logger wandb trainer
    callbacks sample sampler sampling eval evaluation test validation teacher discriminator text clip fid accelerate
    deepspeed distributed groups inference infer val generate generation ae vqvae projector feature classifier guide
    ddconfig
    """.split()
)
#: Sections that may still give the classes and the image size.
_DATA = {"data", "dataset", "dataloader"}
#: Keys that only name their section: ``model: {name: SiT-XL/2}``.
_NAMES_SECTION = {"name", "type", "value", "_target_", "_name_", "_type_"}
_NOTHING = (None, "", "None", "null", "???")


@dataclass(frozen=True)
class Said:
    """A value that a source gives for a property, with the key and the words that name it in messages."""

    value: Any
    key: str
    source: str

    def __str__(self) -> str:
        return f"{self.source} ({self.value})"


@dataclass
class Evidence:
    """What all sources say together.

    Attributes:
      path: the checkpoint, for messages.
      said: values by property, as in :data:`~.keys.KEYS`.
      notes: sentences for the user: guesses, and what was found but not understood.
    """

    path: Path
    said: dict[str, Said] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def value(self, what: str) -> Any:
        """Returns the value of a property, or None."""
        return self.said[what].value if what in self.said else None

    def add(self, what: str, said: Said) -> None:
        """Adds a value; raises if another source gives a different one."""
        if (other := self.said.setdefault(what, said)).value != said.value:
            raise self.contradiction(other, said)

    def contradiction(self, first: Said | str, second: Said | str) -> Ptq4ditError:
        """Makes the error for two pieces of evidence that disagree."""
        spoken = [said for said in (first, second) if isinstance(said, Said)]
        files = [said.source.partition(": ")[0] for said in spoken if ": " in said.source]
        keys = dict.fromkeys([said.key for said in spoken] + files)
        remedy = (
            f"leave the other out with ignore ({' or '.join(f'--ignore {key}' for key in keys)})"
            if keys
            else "correct the option"
        )
        return Ptq4ditError(
            f"The checkpoint {self.path} contradicts itself: {first}, but {second}; find out which is right, and {remedy}."
        )

    def guess(self, what: str, option: str) -> None:
        """Notes a guess where no source decides."""
        self.notes.append(f"Guess: {what}. To override: {option}.")


class Ignored:
    """The keys and files that the user wants left out, and which of them were found."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names, self.met = {name.strip() for name in names if name.strip()}, set[str]()

    def __contains__(self, name: str) -> bool:
        if name in self.names:
            self.met.add(name)
        return name in self.names

    def check(self, path: Path) -> None:
        """Raises if a name was found nowhere."""
        if missed := sorted(self.names - self.met):
            raise Ptq4ditError(f"Nothing beside or in {path} is named {', '.join(missed)}, so it cannot be ignored.")


def collect(file: TensorFile, ignored: Ignored, *, without: Iterable[str] = (), is_on: Collection[str] = ()) -> Evidence:
    """Collects all evidence on a checkpoint.

    Args:
      file: the opened checkpoint.
      ignored: keys, and names of files, to leave out.
      without: names of files beside the weights that are read elsewhere.
      is_on: keys that must be off in a plain DiT, and on in the network of these tensors.

    Raises:
      Ptq4ditError: a key that has another value than a DiT's; a value that makes no sense; two sources that contradict each
        other; a configuration that cannot be read.
    """
    evidence, unknown = Evidence(file.path), []
    for source, sections, key, value in _entries(file, ignored, set(without)):
        words = set(re.findall(r"[a-z]+", " ".join(sections).lower()))
        elsewhere = words & _ELSEWHERE
        if key in ignored or (elsewhere and (key not in IMAGE_KEYS or not elsewhere <= _DATA)):
            continue
        try:
            if isinstance(value, str) and "${" in value:  # a reference that Hydra did not resolve
                raise Unread
            if key in is_on:
                if value in (*_NOTHING, False, 0, "false", "False"):
                    raise Unfit("and its tensors are those of a network that has it")
            elif key in MUST_BE:
                MUST_BE[key].check(value)
                if value == "gelu":
                    evidence.notes.append(f"Guess: {source} = 'gelu' is its tanh approximation, as in DiT.")
            elif key in KEYS:
                if value not in _NOTHING:
                    evidence.add(KEYS[key].what, Said(KEYS[key].read(value), key, source))
            elif ZERO_SNR.search(key) and value not in (*_NOTHING, False, 0, "False", "false"):
                raise Unfit("and only the linear schedule is supported")
            elif _may_matter(key, value):
                unknown.append(f"{source} = {_shown(value)}")
        except Unread:
            unknown.append(f"{source} = {_shown(value)}")
        except Unfit as error:
            what = f"The checkpoint {file.path} says {source} = {_shown(value)}, {error}"
            raise Ptq4ditError(f"{what}; leave it out with ignore (--ignore {key}) only if you know better.") from error
    if unknown:
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        evidence.notes.append(
            f"Not understood: {', '.join(unknown[:8])}{more}; see that none changes what the network computes."
        )
    return evidence


def _may_matter(key: str, value: Plain) -> bool:
    """Whether a key that is not understood may affect what the network computes."""
    if value in (*_NOTHING, False, 0):
        return False
    flow = key == "scheduler" and "flow" in str(value).lower()
    return flow or SUSPECT.search(key) is not None or not HARMLESS.search(key)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _parts(name: str) -> tuple[list[str], str]:
    """Splits the name of a setting into its sections and its key."""
    parts = [part for part in parts_of(name) if part not in _INNER] or [name]
    keys = [part.lower().replace("-", "_") for part in parts]
    if keys[-1] in _NAMES_SECTION and len(keys) > 1 and (keys[-2] in KEYS or keys[-2] in MUST_BE):
        return parts[:-2], keys[-2]
    return parts[:-1], keys[-1]


def _entries(file: TensorFile, ignored: Ignored, without: set[str]) -> Iterator[tuple[str, list[str], str, Plain]]:
    """Yields for each plain value of a configuration where it is, its sections, its key in lower case, and the value."""
    facts = spelled_out(file.contents.facts, lambda name: _holds_settings(name.rpartition(".")[2]))
    for name, value in (*facts.items(), *_scalars(file)):
        sections, key = _parts(name)
        inside = [part for part in sections if _holds_settings(part)]
        if inside and not (is_optimizer(".".join(sections)) and "param_groups" in sections):
            yield name, sections[sections.index(inside[0]) :], key, value
        elif not sections and (key in KEYS or key in MUST_BE):
            yield name, [], key, value
    for path in config_files(file):
        if path.name in without or path.name in ignored:
            continue
        settings = read_settings(path)
        if other := _another(settings):
            yield f"{path.name} (which is left out) is of", [], "another network", other
            continue
        for name, value in flatten(settings, inert_children).facts.items():
            sections, key = _parts(name)
            yield f"{path.name}: {name}", sections, key, value


def _holds_settings(part: str) -> bool:
    """Whether a part of a name is that of a container of settings."""
    return not _SETTINGS.isdisjoint(re.findall(r"[a-z]+", part.lower()))


def _another(settings: Mapping[str, Any]) -> str:
    """Returns the class that a configuration of diffusers or transformers names, if it is no image transformer."""
    names = settings.get("architectures") or settings.get("_class_name") or ""
    text = ", ".join(map(str, names)) if isinstance(names, list) else str(names)
    return "" if re.search(r"di?t|transformer2d|sit", text, re.IGNORECASE) else text[:80]


def _scalars(file: TensorFile) -> Iterator[tuple[str, Plain]]:
    """Yields the numbers that are stored among the settings as arrays without axes."""
    for name, tensor in file.items():
        parts = set(re.findall(r"[a-z]+", name.lower()))
        if not tensor.shape and parts & _SETTINGS and tensor.dtype.kind in "iufb":
            yield name, tensor.read().item()


def config_files(file: TensorFile) -> list[Path]:
    """Returns the configuration files beside the weights, and those above, up to the first folder that is not one of steps."""
    base = file.path if file.path.is_dir() else file.files[0].parent
    folders = [base, base / ".hydra"]
    while _STEPS.fullmatch(base.name) and base.name and base.parent != base and len(folders) < 6:
        base = base.parent
        folders += [base, base / ".hydra"]
    own = [f"{file.path.stem}.{end}" for end in ("json", "yaml", "yml")]
    found = [folder / name for folder in folders for name in (*CONFIG_FILES, *own)]
    return [path for path in dict.fromkeys(found) if path.is_file() and path != file.path and ".index." not in path.name]


def read_settings(path: Path) -> Mapping[str, Any]:
    """Reads a JSON or YAML file of settings; no code in it is run.

    Raises:
      Ptq4ditError: it is no such file, or far larger than any.
    """
    remedy = f"mend it, or leave it out with ignore (--ignore {path.name})"
    if path.suffix != ".json":
        values = read_yaml(path, remedy)
    elif path.stat().st_size:  # scripts do write NaN and infinity; they are refused where they decide something
        values = read_json(path, remedy, limit=MAX_SETTINGS, finite=False)
    else:
        values = {}
    return values if isinstance(values, dict) and values.get("format") != "ptq4dit_jax" else {}
