"""Arrays of an .npz: read as NumPy reads them, or refused in one sentence before their memory is taken."""

import io
import struct
import warnings
import zipfile
from typing import Any

import numpy as np
import pytest
from mutations import mutated_bytes

from ptq4dit_jax import memory, npz_file
from ptq4dit_jax.errors import Ptq4ditError
from ptq4dit_jax.npz_file import read_npz

ARRAYS = {
    "f": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
    "big": np.arange(5, dtype=">i4"),
    "half": np.ones((2, 0, 3), np.float16),
    "scalar": np.array(7, np.uint8),
    "flags": np.array([True, False]),
    "long": np.random.default_rng(0).normal(size=400_000),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_those_that_numpy_reads(save, tmp_path):
    save(tmp_path / "a.npz", **ARRAYS)
    arrays, present = read_npz(tmp_path / "a.npz", [*ARRAYS, "absent"])
    assert present == ", ".join(ARRAYS)
    assert arrays.keys() == ARRAYS.keys()
    with np.load(tmp_path / "a.npz") as expected:
        for name, array in arrays.items():
            assert (array.dtype, array.shape) == (expected[name].dtype, expected[name].shape)
            np.testing.assert_array_equal(array, expected[name])
            assert array.flags.writeable


def member(header, data, version=(1, 0)):
    text = header.encode()
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(text)) + text + data


def header(descr="'<f4'", shape="(1,)", order="False"):
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}\n"


def archive(path, content, patch=None, **options):
    """A zip with the member x.npy; ``patch`` is an offset in its entry of the directory and what is written there."""
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("x.npy", content)
    if patch is not None:
        data = bytearray(path.read_bytes())
        offset, value = patch
        start = data.index(b"PK\1\2") + offset
        data[start : start + len(value)] = value
        path.write_bytes(data)
    return path


FOUR = bytes(4)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (member(header(shape="(100_000_000_000,)"), FOUR), ("400,000,000,000 bytes", "4 are there")),
        (member(header(shape=f"({2**70},)"), FOUR), (f"{2**72:,} bytes",)),
        (member(header(shape="(0,)"), FOUR), ("declares 0 bytes, and 4 are there",)),
        (member(header(shape="(-1, -1)"), FOUR), ("bytes",)),
        (member(header(shape="(1, 2)"), FOUR), ("8 bytes, and 4",)),
        (member(header(shape=str((1,) * 200)), FOUR), ()),
        (member(header("'|O'"), FOUR), ("objects of Python", "allow_pickle=False")),
        (member(header("[('a', '<f4')]"), FOUR), ("records",)),
        (member(header("('<f2', (2,))"), FOUR), ("numbers",)),
        (member(header("'nonsense'"), FOUR), ()),
        (member(header().replace("}", ""), FOUR), ()),
        (member("(" * 5000, FOUR), ()),
        (member("if x:\n  y\n z\n", FOUR), ()),
        (member("__import__('os').system('touch ran')\n", FOUR), ()),
        (member(header(), FOUR, (9, 9)), ()),
        (b"\x93NUMPX" + FOUR, ()),
        (b"", ()),
    ],
    ids=range(17),
)
def test_members_that_are_refused(content, words, tmp_path, monkeypatch, raises_sentence):
    monkeypatch.chdir(tmp_path)
    with raises_sentence(str(tmp_path / "a.npz"), "write it again" if not words else "", *words):
        read_npz(archive(tmp_path / "a.npz", content), ["x"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ((10, b"\x63\0"), ("method 99",)),
        ((10, b"\x0e\0"), ("method 14",)),
        ((8, b"\1\0"), ("encrypted",)),
        ((16, b"\1\2\3\4"), ("write it again",)),  # the checksum
        ((24, struct.pack("<I", 2**30)), (f"{2**30:,}", "they cannot")),
        ((42, struct.pack("<I", 2**20)), ("write it again",)),
    ],
)
def test_directories_that_are_refused(patch, words, tmp_path, raises_sentence):
    content = member(header(), FOUR)
    with raises_sentence(str(tmp_path / "a.npz"), *words):
        read_npz(archive(tmp_path / "a.npz", content, patch), ["x"])


def test_a_flipped_byte_is_noticed(tmp_path, raises_sentence):
    np.savez(tmp_path / "a.npz", x=np.zeros(100, np.float32))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[200] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    with raises_sentence("a.npz", "write it again"):
        read_npz(tmp_path / "a.npz", ["x"])


def test_what_does_not_fit_into_memory_is_refused_with_both_numbers(tmp_path, monkeypatch, raises_sentence):
    np.savez(tmp_path / "a.npz", x=np.zeros(250_000_000, np.uint8))
    monkeypatch.setattr(memory, "free_on_host", lambda: 200_000_000)
    monkeypatch.setattr(npz_file.np, "empty", lambda *_: pytest.fail("memory was taken"))
    with raises_sentence("array x", "0.2 GB of memory, and 0.2 GB are free"):
        read_npz(tmp_path / "a.npz", ["x"])


def test_an_archive_of_very_many_members(tmp_path, raises_sentence):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        for i in range(20_000):
            file.writestr(f"{i}.npy", b"")
    with raises_sentence("list of members", "1,000,000"):
        read_npz(tmp_path / "a.npz", ["x"])


def test_two_arrays_of_one_name(tmp_path, raises_sentence):
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        warnings.simplefilter("ignore")
        for _ in range(2):
            file.writestr("x.npy", member(header(), FOUR))
    with raises_sentence("two arrays of one name"):
        read_npz(tmp_path / "a.npz", ["x"])


def test_mutations(tmp_path):
    """Small files with flipped, cut and repeated bytes: the same arrays, or one sentence."""
    rng, path, kept, refused = np.random.default_rng(0), tmp_path / "a.npz", 0, 0
    whole: dict[str, Any] = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "t": np.arange(3)}
    contents = []
    for save in (np.savez, np.savez_compressed):
        save(buffer := io.BytesIO(), **whole)
        contents.append(buffer.getvalue())
    for i in range(1500):
        path.write_bytes(mutated_bytes(contents[i % 2], rng))
        try:
            arrays, _ = read_npz(path, ["x", "t"])
        except Ptq4ditError as error:
            arrays, said = {}, str(error)
            refused += said.isprintable() and str(path) in said
        for name, array in arrays.items():
            kept += 1
            assert array.tobytes() == whole[name].tobytes()
    assert kept > 100
    assert refused > 100


def test_a_list_of_members_that_hides_one(tmp_path, raises_sentence):
    """It has no checksum: another name there, and an entry that takes the next one for its comment."""
    np.savez(tmp_path / "a.npz", x=np.ones(3), y=np.ones(3))
    content = (tmp_path / "a.npz").read_bytes()
    directory = content.index(b"PK\1\2")
    renamed, swallowed = bytearray(content), bytearray(content)
    renamed[content.index(b"y.npy", directory)] = ord("z")
    swallowed[directory + 32 : directory + 34] = (len(content[directory:]) - 22 - 51).to_bytes(2, "little")
    for damaged in (renamed, swallowed):
        (tmp_path / "b.npz").write_bytes(damaged)
        with raises_sentence("b.npz"):
            read_npz(tmp_path / "b.npz", ["x"])
