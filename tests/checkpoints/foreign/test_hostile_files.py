"""Files made to harm: refused by what is wrong with them, whatever they declare, and read as they were when opened."""

import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import textwrap
import zipfile

import foreign_files
import ml_dtypes
import msgpack
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from flax import serialization
from foreign_files import number, text

from ptq4dit_jax.checkpoints.foreign import open_tensors
from ptq4dit_jax.checkpoints.foreign.lazy import Contents, OtherKey, flatten, plain_key
from ptq4dit_jax.checkpoints.foreign.pickle_machine import inert_children

ARRAYS = {"a": np.arange(60, dtype=np.float32).reshape(3, 20), "b": np.ones(50, np.float32)}


def write(kind, folder, arrays):
    """A file or folder of a kind."""
    path = folder / f"x.{kind}"
    match kind:
        case "torch":
            foreign_files.write_torch(path, arrays)
        case "pickle-2" | "pickle-4" | "pickle-5":
            foreign_files.write_pickle(path, arrays, int(kind[-1]))
        case "safetensors":
            safetensors.numpy.save_file(arrays, path)
        case "msgpack":
            path.write_bytes(serialization.msgpack_serialize(arrays))
        case "orbax" | "zarr":
            handler = ocp.PyTreeCheckpointHandler(use_ocdbt=kind == "orbax")
            ocp.Checkpointer(handler).save(path, args=ocp.args.PyTreeSave(arrays))
    return path


KINDS = ["torch", "pickle-2", "pickle-4", "pickle-5", "safetensors", "msgpack", "orbax", "zarr"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["cut", "overwritten", "replaced", "longer", "removed"])
def test_a_file_that_changes_while_it_is_open(kind, how, tmp_path, raises_sentence):
    array = np.random.default_rng(0).normal(size=(300, 200)).astype(np.float32)
    path = write(kind, tmp_path, {"a": array})
    opened = open_tensors(path)
    np.testing.assert_array_equal(opened["a"].read(), array)
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        content, state = file.read_bytes(), file.stat()
        match how:
            case "cut":
                os.truncate(file, len(content) // 2)
            case "overwritten":  # the same size, in place
                with file.open("r+b") as stream:
                    stream.write(bytes(255 - byte for byte in content))
                os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1_000_000))
            case "replaced":  # the same size, time and bytes
                (tmp_path / "other").write_bytes(content)
                os.utime(tmp_path / "other", ns=(state.st_atime_ns, state.st_mtime_ns))
                os.replace(tmp_path / "other", file)
            case "longer":
                with file.open("ab") as stream:
                    stream.write(b"\0")
            case "removed":
                file.unlink()
    with raises_sentence("(300, 200)"):
        opened["a"].read()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_little_memory_is_called_that(kind, tmp_path):
    path = write(kind, tmp_path, {"w": np.random.default_rng(0).random(2**25, np.float32)})
    program = f"""
        import resource
        from pathlib import Path
        from ptq4dit_jax.checkpoints.foreign import open_tensors
        tensor = open_tensors({str(path)!r})["w"]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**27 - 2**20,) * 2)  # less than the tensor, enough for threads
        tensor.read()
    """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 1, done.stderr
    assert "Ptq4ditError: Cannot read a tensor of shape (33554432,)" in done.stderr.splitlines()[-1]
    assert "too little free memory" in done.stderr.splitlines()[-1]


# Zips of torch


def patched_zip(path, arrays, change):
    """A torch file whose bytes ``change`` gets as a bytearray."""
    data = bytearray(foreign_files.write_torch(path, arrays).read_bytes())
    change(data)
    path.write_bytes(data)
    return path


def member(data, name):
    """Where a member's bytes begin."""
    return data.index(b"archive/" + name) + len(b"archive/" + name)


@pytest.mark.parametrize("at", range(0, 200, 13))
def test_every_byte_of_a_storage_is_under_its_checksum(at, tmp_path, raises_sentence):
    def flip(data):
        data[member(data, b"data/1") + at] ^= 1

    opened = open_tensors(patched_zip(tmp_path / "x", ARRAYS, flip))
    np.testing.assert_array_equal(opened["a"].read(), ARRAYS["a"])
    with raises_sentence("'archive/data/1'", "checksum"):
        opened["b"].read()


def test_a_part_of_a_storage_is_under_the_checksum_of_the_whole(tmp_path, raises_sentence):
    base = np.arange(100, dtype=np.float32)
    table = foreign_files.torch_pickle({"w": base[:3]}).replace(number(3) + b"tQ", number(100) + b"tQ", 1)
    path = foreign_files.write_torch(tmp_path / "x", {"w": base}, table=table)
    np.testing.assert_array_equal(open_tensors(path)["w"].read(), base[:3])

    data = bytearray(path.read_bytes())
    data[member(data, b"data/0") + 399] ^= 1  # far behind the part
    path.write_bytes(data)
    with raises_sentence("'archive/data/0'", "checksum"):
        open_tensors(path)["w"].read()


def test_the_table_is_under_its_checksum(tmp_path, raises_sentence):
    def rename(data):
        at = data.index(text("a"))
        data[at + 5] = ord("c")

    with raises_sentence("'archive/data.pkl'", "checksum"):
        open_tensors(patched_zip(tmp_path / "x", ARRAYS, rename))


def test_a_zip_that_was_written_without_checksums(tmp_path):
    def clear(data):
        for found in re.finditer(re.escape(b"PK\1\2"), bytes(data)):
            data[found.start() + 16 : found.start() + 20] = bytes(4)

    opened = open_tensors(patched_zip(tmp_path / "x", ARRAYS, clear))
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(opened[name].read(), array)


def zip_of(path, names):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", foreign_files.torch_pickle({}))
        for name in names:
            archive.writestr(name, b"12345678")
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["archive/data/0", "archive/data/0"], ["two members 'archive/data/0'"]),
        (["archive/data.pkl"], ["two members 'archive/data.pkl'"]),
        (["archive/data/0", "other/data/1"], ["2 folders"]),
        (["data/0"], ["2 folders"]),
        (["archive/a\x1b[31m\n", "archive/a\x1b[31m\n"], ["'archive/a\\\\x1b[31m\\\\n'"]),
    ],
)
def test_members_that_are_not_torchs(names, parts, tmp_path, raises_sentence):
    with raises_sentence(*parts):
        open_tensors(zip_of(tmp_path / "x", names))


def test_members_that_overlap(tmp_path, raises_sentence):
    """Two entries of the directory for one place under two names."""
    raw = zip_of(tmp_path / "x", ["archive/data/0"]).read_bytes()
    directory = raw.index(b"PK\1\2")
    end = raw.index(b"PK\5\6")
    last = raw[raw.rindex(b"PK\1\2") : end]
    entries = raw[directory:end] + last.replace(b"data/0", b"data/1")
    tail = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 3, 3, len(entries), directory, 0)
    (tmp_path / "x").write_bytes(raw[:directory] + entries + tail)
    with raises_sentence("overlap", "'archive/data/0'", "'archive/data/1'"):
        open_tensors(tmp_path / "x")


def test_a_directory_larger_than_any(tmp_path, raises_sentence, monkeypatch):
    path = zip_of(tmp_path / "x", [f"archive/data/{i}" for i in range(100)])
    open_tensors_fails = raises_sentence("zip directory has", "1000")
    monkeypatch.setattr("ptq4dit_jax.checkpoints.foreign.torch_zip.MAX_DIRECTORY", 1000)
    with open_tensors_fails:
        open_tensors(path)


# Safetensors and msgpack


def safetensors_file(header, body=b""):
    return struct.pack("<Q", len(header)) + header + body


def entry(name, dtype, shape, begin, end):
    return f'"{name}":' + json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})


@pytest.mark.parametrize(
    ("entries", "body", "part"),
    [
        ([entry("w", "F32", [1], 0, 4), entry("w", "I32", [1], 0, 4)], 4, "two entries 'w'"),
        (['"__metadata__":{"a":"1","a":"2"}', entry("w", "F32", [1], 0, 4)], 4, "two entries 'a'"),
        ([entry("w", "F32", [1], 0, 4)], 5, "not fully covered"),
        ([entry("w", "F32", [1], 0, 4)], 3, "cut off"),
        ([entry("v", "F32", [1], 0, 4), entry("w", "F32", [1], 8, 12)], 12, "invalid offset"),
        ([entry("w", "F4", [2], 0, 1)], 1, "unknown type 'F4'"),
        ([entry("w", "F8_E8M0", [2], 0, 2)], 2, "unknown type 'F8_E8M0'"),
        ([entry("w", "F32", [1, 0, 2**30, 2**30], 0, 0)], 0, "impossible shape (1, 0, 1073741824, 1073741824)"),
        ([entry("w", "U8", [1] * 17, 0, 1)], 1, "impossible shape"),
    ],
)
def test_headers_of_safetensors(entries, body, part, tmp_path, raises_sentence):
    (tmp_path / "x").write_bytes(safetensors_file(b"{" + ",".join(entries).encode() + b"}", bytes(body)))
    with raises_sentence(part):
        open_tensors(tmp_path / "x")


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_narrow_floats_of_safetensors(dtype, tmp_path):
    """By their bits: 1, -2 and 0.5."""
    short, bits = {
        "bfloat16": ("BF16", bytes.fromhex("803f00c0003f")),
        "float8_e4m3fn": ("F8_E4M3", bytes.fromhex("38c030")),
        "float8_e5m2": ("F8_E5M2", bytes.fromhex("3cc038")),
    }[dtype]
    header = b"{" + entry("w", short, [3, 1], 0, len(bits)).encode() + b"}"
    (tmp_path / "x").write_bytes(safetensors_file(header, bits))
    read = open_tensors(tmp_path / "x")["w"].read()
    assert (read.dtype, read.shape) == (np.dtype(getattr(ml_dtypes, dtype)), (3, 1))
    assert [float(value) for value in read[:, 0]] == [1, -2, 0.5]


def msgpack_array(shape, dtype, data):
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, data)))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"\x82\xa1w\x01\xa1w\x02", "two entries 'w'"),
        (b"\x82\xa1w\x01\x81\xa1v\x02\x03", "keys that are no names"),
        (b"\x83\xa1w\x01\xa11\x02\x01\x03", "two entries '1'"),
        (b"\x81\xa1w\x01\x00", "something follows"),
        (b"\x81\xa1w\xc7\x0c\x01\x93\x91\x01\xa4int8\xc4\x01\x07\0", "does not fill its place"),
        (b"\x81\xa1w\xc7\x0b\x01\x93\x91\x01\xa4int8\xc4\x02\x07\x07", "does not fill its place"),
        (b"\x81\xa1w\xc7\x0b\x01\x93\x91\x02\xa4int8\xc4\x01\x07", "shape (2,) and type int8 has 1 bytes"),
        (b"\x81\xa1w\xdf\xff\xff\xff\xff", "cut off"),
        (b"\x81\xa1w\xc6\xff\xff\xff\xff", "cut off"),
    ],
)
def test_msgpack_that_flax_never_writes(content, part, tmp_path, raises_sentence):
    (tmp_path / "x").write_bytes(content)
    with raises_sentence(part):
        open_tensors(tmp_path / "x")


# Shapes without bytes, in every format

EMPTY = [0, 2**31, 2**31]


def pickled_array(shape):
    """NumPy's, of no bytes."""
    made = b"cnumpy._core.multiarray\n_reconstruct\n)R(K\x01" + b"(" + b"".join(map(long, shape)) + b"t"
    return b"\x80\x04" + made + b"cnumpy\ndtype\n(" + text("f4") + b"tR\x89C\0tb."


def long(value):
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


@pytest.mark.parametrize("shape", [EMPTY, [2**31, 0, 2**31], [2**41, 0], [0] * 17])
def test_an_empty_axis_beside_huge_ones(shape, tmp_path, raises_sentence):
    torch = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    )
    torch += b"K\0tQK\0(" + b"".join(map(long, shape)) + b"t(" + b"K\x01" * len(shape) + b"t\x89}tR."
    with zipfile.ZipFile(tmp_path / "torch", "w") as archive:
        archive.writestr("archive/data.pkl", torch)
        archive.writestr("archive/data/0", b"")
    (tmp_path / "pickle").write_bytes(pickled_array(shape))
    (tmp_path / "msgpack").write_bytes(msgpack.packb({"w": msgpack_array(shape, "float32", b"")}))
    header = b"{" + entry("w", "F32", shape, 0, 0).encode() + b"}"
    (tmp_path / "safetensors").write_bytes(safetensors_file(header))
    for kind in ("torch", "pickle", "msgpack", "safetensors"):
        with raises_sentence("impossible shape"):
            open_tensors(tmp_path / kind)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"shape": [2**20, 2**20]}, "MB of tensors"),
        ({"shape": [2**40, 2**40]}, "impossible shape"),
        ({"chunks": [2**20, 2**10]}, "in pieces of 4295.0 MB"),
    ],
)
def test_descriptions_of_arrays_in_orbax_folders(change, part, tmp_path, raises_sentence):
    folder = write("zarr", tmp_path, ARRAYS)
    description = json.loads((folder / "a" / ".zarray").read_text())
    (folder / "a" / ".zarray").write_text(json.dumps(description | change))
    with raises_sentence(part):
        open_tensors(folder)
    shutil.rmtree(folder)


# Pickles


def test_empty_arrays_of_protocol_2(tmp_path):
    """Whose bytes are a call of ``bytes``."""
    tree = {"none": np.zeros((0, 3), np.float32), "some": np.ones(2, np.float32)}
    opened = open_tensors(foreign_files.write_pickle(tmp_path / "x", tree, 2))
    assert {name: tensor.read().shape for name, tensor in opened.items()} == {"none": (0, 3), "some": (2,)}


def test_long_arrays_of_protocol_2(tmp_path):
    """Whose bytes are a long text with a character per byte."""
    array = np.random.default_rng(0).normal(size=(300, 200))
    opened = open_tensors(foreign_files.write_pickle(tmp_path / "x", {"w": array, "t": np.asfortranarray(array)}, 2))
    np.testing.assert_array_equal(opened["w"].read(), array)
    np.testing.assert_array_equal(opened["t"].read(), array)


PICKLES = {
    "an index of the memo": (b"Nr" + struct.pack("<I", 2**31) + b".", "numbers its values"),
    "an index of the memo, one byte": (b"Nq\x05.", "numbers its values"),
    "an integer": (b"\x8b" + struct.pack("<i", 2**20) + b"\1" * 2**20 + b".", "integer of 1048576 bytes"),
    "bytes that are not there": (b"\x8e" + struct.pack("<Q", 2**62) + b".", "cut off"),
    "a text that is not there": (b"X" + struct.pack("<I", 2**32 - 1) + b".", "cut off"),
    "a name of 2,000 characters": (text("m" * 2000) + text("n") + b"\x93.", "name without end"),
    "a name on a line": (b"c" + b"m" * 2000 + b"\nn\n.", "name without end"),
    "two entries of one name": (b"}(" + text("w") + b"K\1" + text("w") + b"K\2u.", "two entries 'w'"),
    "a number and its text": (b"}(K\1N" + text("1") + b"Nu.", "two entries '1'"),
    "a long key": (b"}" + text("k" * 5000) + b"K\1s.", "names are longer"),
    "keys that add up": (b"".join(b"}" + text("k" * 300) for _ in range(5)) + b"K\1" + b"s" * 5 + b".", "names are longer"),
    "a shape of containers": (pickled_array([])[2:].replace(b"K\x01(t", b"K\x01" + b")" + b"2\x86" * 50), "impossible shape"),
    "a shape that is a dict": (pickled_array([])[2:].replace(b"K\x01(t", b"K\x01}"), "has a dict for a shape"),
    "a name with escape sequences": (b"cos\nsy\x1b[2Jstem\n)R.", "os.sy\\x1b[2Jstem"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickles_that_no_pickler_writes(case, tmp_path, raises_sentence):
    content, part = PICKLES[case]
    (tmp_path / "x").write_bytes(b"\x80\x04" + content)
    with raises_sentence(part):
        open_tensors(tmp_path / "x")


def test_keys_are_never_hashed_as_the_file_wants():
    class Unhashable(tuple):
        def __hash__(self):
            raise AssertionError("hashed")

        def __eq__(self, other):
            raise AssertionError("compared")

    assert [plain_key(key) for key in ("a", 7, -1, True, ("a", 7))] == ["a", "7", "-1", "True", ("a", "7")]
    odd = [plain_key(key) for key in (0.5, None, Unhashable((1.0,)), ("a", 0.5), (), ("a",) * 100)]
    assert [key.kind for key in odd if isinstance(key, OtherKey)] == [
        "float",
        "NoneType",
        "Unhashable",
        "tuple",
        "tuple",
        "tuple",
    ]
    assert OtherKey("float") != OtherKey("float")
    assert len({OtherKey("float"), OtherKey("float")}) == 2


def test_visits_of_shared_containers_are_counted():
    """One list of 2,000 values in a thousand places is two million values."""
    shared = [None] * 2000
    with pytest.raises(Exception, match="more values than any checkpoint"):
        flatten([shared] * 1000, inert_children)
    found = flatten([shared] * 100, inert_children)
    assert isinstance(found, Contents)
    assert not found.tensors


FLOODS = {
    "tuples": b"(" + b"}\x85" * 1_500_000 + b"t.",
    "sets in the memo": b"(" + b"\x8f\x94" * 900_000 + b"t.",
    "calls": b"ca.b\nC\nq\0(" + b"h\0)R" * 1_500_000 + b"t.",
    "objects of objects": b"ca.b\nC\n" + b")R" * 390_000 + b".",
    "nested tuples": b")" + b"\x85" * 1_900_000 + b".",
    "nested lists": b"]" * 900_000 + b"a" * 899_999 + b".",
    "copies": b"cbuiltins\ndict\nq\0}("
    + b"".join(number(i) + b"N" for i in range(200_000))
    + b"u\x85q\1("
    + b"h\0h\1R" * 10_000
    + b"t.",
    "pairs": b"ccollections\nOrderedDict\nq\0]("
    + b"".join(number(i) + b"N\x86" for i in range(100_000))
    + b"e\x85q\1("
    + b"h\0h\1R" * 10_000
    + b"t.",
    "references": b"](" + b"N" * 100_000 + b"eq\0(" + b"h\0" * 1_000_000 + b"t.",
    "integers of equal hashes": b"}("
    + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(200_000))
    + b"u.",
    "tuples of equal hashes": b"}("
    + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"\x85N" for i in range(200_000))
    + b"u.",
    "floats of equal hashes": b"}(" + b"".join(b"G" + struct.pack(">d", 0.5) + b"N" for _ in range(200_000)) + b"u.",
    "texts of four bytes a character": b"(" + (text("a" * 60_000 + "\U0001f600")) * 1000 + b"t.",
}


@pytest.mark.slow
def test_floods_take_neither_time_nor_memory(tmp_path):
    """Each in a process of its own, with a minute of processor time and a gigabyte."""
    for index, content in enumerate(FLOODS.values()):
        (tmp_path / f"{index:02}").write_bytes(b"\x80\x04" + content)
    big = io.BytesIO()
    with zipfile.ZipFile(big, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x04" + FLOODS["sets in the memo"])
    (tmp_path / "zip").write_bytes(big.getvalue())
    (tmp_path / "msgpack").write_bytes(b"\x81\xa1w\xdd" + struct.pack(">I", 5_000_000) + b"\x80" * 5_000_000)
    names = b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(250_000))
    (tmp_path / "safetensors").write_bytes(safetensors_file(b"{" + names + b"}"))
    program = f"""
        import os, resource
        from pathlib import Path
        from ptq4dit_jax.checkpoints.foreign import open_tensors
        from ptq4dit_jax.errors import Ptq4ditError
        for path in sorted(Path({str(tmp_path)!r}).iterdir()):
            if (child := os.fork()) == 0:
                resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
                try:
                    open_tensors(path)
                except Ptq4ditError:
                    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                    os._exit(0 if grown < 2**20 else 2)
                os._exit(3)
            print(path.name, os.waitpid(child, 0)[1], flush=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=1200,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    results = dict(line.split() for line in done.stdout.splitlines())
    assert len(results) == len(FLOODS) + 3, done.stderr
    assert set(results.values()) == {"0"}, results
