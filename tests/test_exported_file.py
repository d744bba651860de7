"""Files of exported samplers: what is written is read, and anything else is one sentence; damage never reaches JAX."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest

import ptq4dit_jax as ptq
from ptq4dit_jax import exported_file
from ptq4dit_jax.exported import ExportedSampler, export_sampler
from ptq4dit_jax.exported_file import load_sampler, save_sampler


@pytest.fixture(scope="module")
def program() -> ExportedSampler:
    sampling = ptq.Sampling("ddim", 2, guidance=ptq.Guidance(2.0, interval=(0.25, 1.0)))
    return export_sampler(helpers.tiny_model(depth=1), 6, sampling=sampling, platform="v5e", devices=3)


@pytest.fixture(scope="module")
def content(program: ExportedSampler, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return save_sampler(program, tmp_path_factory.mktemp("program") / "p").read_bytes()


def rewritten(content: bytes, module: bytes | None = None, **changes: Any) -> bytes:
    """A file with other fields or another program in it, and the hash that belongs to it."""
    length = int.from_bytes(content[48:56], "little")
    said = json.loads(content[56 : 56 + length])
    said |= {name: change(said[name]) if callable(change) else change for name, change in changes.items()}
    text = json.dumps({name: value for name, value in said.items() if value is not ...}).encode()
    rest = len(text).to_bytes(8, "little") + text + (content[56 + length :] if module is None else module)
    return content[:16] + hashlib.sha256(rest).digest() + rest


def test_what_is_written_is_read(program: Any, content: bytes, tmp_path: Path) -> None:
    where = save_sampler(program, tmp_path / "new" / "p")
    assert where == tmp_path / "new" / "p"
    assert load_sampler(where) == program
    assert load_sampler(str(where)).sampling == program.sampling
    assert where.read_bytes() == content  # nothing in it depends on when or where it is written
    assert [path.name for path in where.parent.iterdir()] == ["p"]
    assert json.loads(content[56 : 56 + int.from_bytes(content[48:56], "little")])["kind"]["model"] == "TPU v5 lite"


def test_what_is_there_stays(program: Any, tmp_path: Path, raises_sentence: Any) -> None:
    path = tmp_path / "p"
    path.write_text("precious")
    with raises_sentence(str(path), "exists already"):
        save_sampler(program, path)
    assert path.read_text() == "precious"
    save_sampler(program, path, overwrite=True)
    assert load_sampler(path) == program
    with raises_sentence("is a folder, which a file cannot replace"):
        save_sampler(program, tmp_path, overwrite=True)


def test_no_damage_reaches_jax(content: bytes, tmp_path: Path, raises_sentence: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every length that is too short, bytes behind the end, and a flipped bit at any of many places."""
    monkeypatch.setattr(exported_file, "_read", lambda *_: pytest.fail("damage got past the hash"))
    path = tmp_path / "p"

    def refused(damaged: bytes, *words: str) -> None:
        path.write_bytes(damaged)
        with raises_sentence(str(path), *words):
            load_sampler(path)

    rng = np.random.default_rng(0)
    for length in [*range(16), *range(16, 60), *rng.integers(60, len(content), 40).tolist()]:
        refused(content[:length], "is no exported sampler" if length < 16 else "is damaged or was cut short")
    for place in [*range(60), *rng.integers(60, len(content), 100).tolist(), len(content) - 1]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        refused(bytes(damaged), "is no exported sampler" if place < 16 else "is damaged or was cut short")
    refused(content + b"x", "is damaged or was cut short")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "another version of ptq4dit_jax"),
        (
            {"versions": lambda said: said | {"ptq4dit_jax": "0.0.1\x1b[2J"}},
            "exported by ptq4dit_jax 0.0.1\\x1b[2J, and this is",
        ),
        ({"convention": 99, "versions": lambda said: said | {"jax": "9.8"}}, "cannot read a sampler that JAX 9.8 exported"),
        ({"kept": [0, 10_000]}, "damaged"),
        ({"kept": [1, 0]}, "damaged"),
        ({"kept": "many"}, "Cannot read"),
        ({"arrays": 5}, "Cannot read"),
        ({"images": ["a", "no type", [1]]}, "Cannot read"),
        ({"sampling": {"sampler": "none"}}, "'none'"),
        ({"sampling": {"colour": 1}}, "Cannot read"),
        ({"kind": ...}, "Cannot read"),
        ({"batch_size": None}, "Cannot read"),
    ],
)
def test_what_it_says_is_checked(changes: Any, words: str, content: bytes, tmp_path: Path, raises_sentence: Any) -> None:
    """As of files that were made by hand, or by other versions."""
    path = tmp_path / "p"
    path.write_bytes(rewritten(content, **changes))
    with raises_sentence(words):
        load_sampler(path)


def test_a_description_that_is_no_json(content: bytes, tmp_path: Path, raises_sentence: Any) -> None:
    for text in (b"\xff\xfe", b"[" * 1000, b'{"version": NaN}', b"[]", b""):
        rest = len(text).to_bytes(8, "little") + text
        (tmp_path / "p").write_bytes(content[:16] + hashlib.sha256(rest).digest() + rest)
        with raises_sentence(str(tmp_path / "p")):
            load_sampler(tmp_path / "p")
    (tmp_path / "p").write_bytes(content[:48] + (2**63).to_bytes(8, "little"))
    with raises_sentence("damaged"):
        load_sampler(tmp_path / "p")


def test_what_is_no_such_file(tmp_path: Path, raises_sentence: Any) -> None:
    with raises_sentence(str(tmp_path / "absent"), "No such file"):
        load_sampler(tmp_path / "absent")
    with raises_sentence(str(tmp_path), "directory"):
        load_sampler(tmp_path)
    np.savez(tmp_path / "a.npz", np.zeros(3))
    with raises_sentence("is no exported sampler; ptq4dit compile makes one"):
        load_sampler(tmp_path / "a.npz")


def test_too_large_a_program_is_not_read(
    content: bytes, tmp_path: Path, raises_sentence: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exported_file, "MAX_PROGRAM", 100)
    (tmp_path / "p").write_bytes(content)
    with raises_sentence("damaged"):
        load_sampler(tmp_path / "p")


def test_fields_that_a_program_has_are_all_in_the_file(program: Any, content: bytes) -> None:
    """A field that is added and not written would be read as its default, if it has one."""
    assert not [field for field in dataclasses.fields(program) if field.default is not dataclasses.MISSING]
