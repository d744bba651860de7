"""JSON and YAML of others: read as they are within stated limits, and otherwise refused in one sentence that says why."""

import json
import math
import subprocess
import sys

import pytest
import yaml

from ptq4dit_jax.documents import MAX_DEPTH, MAX_DIGITS, MAX_JSON, MAX_VALUES, MAX_YAML, parse_json, read_json, read_yaml


@pytest.fixture
def file(tmp_path):
    """A file with this content."""

    def write(content):
        path = tmp_path / "config"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


SETTINGS = {"model": {"heads": 3, "rate": 1e-4, "names": ["a", "größe"], "none": None, "yes": True}, "seed": 2**127}


def test_what_is_within_the_limits_is_read_as_it_is(file):
    assert read_json(file(json.dumps(SETTINGS)), "mend it") == SETTINGS
    assert read_yaml(file(yaml.safe_dump(SETTINGS)), "mend it") == SETTINGS
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert read_json(file(deep), "mend it") == read_yaml(file(deep), "mend it") == json.loads(deep)
    assert read_json(file("1" * MAX_DIGITS), "mend it") == int("1" * MAX_DIGITS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ()),
        ('"a', ()),
        ("{'a': 1}", ()),
        ('{"a": 1} // a comment', ()),
        ('{"a": 1}\n{"a": 2}\n', ()),
        (b'{"\xff": 1}', ()),
        (b"\xff\xfe\x00", ()),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), ("nests", str(MAX_DEPTH))),
        ('{"a":' * 100_000, ("nests", str(MAX_DEPTH))),
        ('{"a": NaN}', ("NaN",)),
        ("[-Infinity]", ("-Infinity",)),
        ("[1e999]", ("1e999", "infinite")),
        ("[" + "1" * (MAX_DIGITS + 1) + "]", (f"{MAX_DIGITS + 1} digits", str(MAX_DIGITS))),
        ("-" + "9" * 50_000, ("50001 digits",)),
        ('{"b": {"a": 1, "a": 1}}', ("'a' is there twice",)),
        ('{"\\u001b[2J": 1, "\\u001b[2J": 1}', ("\\x1b[2J", "twice")),
        ("[" + "0," * MAX_VALUES + "0]", (f"{MAX_VALUES:,} values",)),
        (b" " * (MAX_JSON + 1), ("larger than any configuration", f"{MAX_JSON:,} bytes")),
    ],
    ids=range(18),
)
def test_json_that_is_refused(text, words, file, raises_sentence):
    with raises_sentence(str(file(text)), "; mend it.", *(words or ("not valid JSON",))):
        read_json(file(text), "mend it")


def test_numbers_that_scripts_write_are_read_where_that_is_asked_for():
    nan, infinite, huge = parse_json("[NaN, -Infinity, 1e999]", "It", "mend it", finite=False)
    assert (math.isnan(nan), infinite, huge) == (True, -math.inf, math.inf)


def levels(first, entry):
    """Eleven levels of YAML, each with ten aliases of the one before."""
    lines = [first] + [entry.format(i=i, before=", ".join([f"*a{i - 1}"] * 10)) for i in range(1, 12)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", ()),
        ("a: b: c", ()),
        ("a: *nobody", ()),
        (b"a: \xff", ()),
        ("a: \x00", ()),
        ("? [1]\n: 2", ()),
        ("a: !!float x", ()),
        ("a: 2001-99-99", ()),
        ("- " * 100_000, ("nests",)),
        ("a: &a [*a]", ("nests",)),
        ("&a {b: *a}", ("nests",)),
        (levels("a0: &a0 [1]", "a{i}: &a{i} [{before}]"), ("values",)),
        ("a: &a {" + ",".join(f"k{i}: 1" for i in range(9000)) + "}\nb: {<<: [" + ",".join(["*a"] * 9000) + "]}", ("merges",)),
        ("a: " + "9" * 5000, ("5000 digits",)),
        ("a: 1\nb: {c: 1, c: 1}", ("'c' is there twice",)),
        ("#" * (MAX_YAML + 1), ("larger than any configuration", f"{MAX_YAML:,} bytes")),
    ],
    ids=range(16),
)
def test_yaml_that_is_refused(text, words, file, raises_sentence):
    with raises_sentence(str(file(text)), "; mend it.", *(words or ("not valid YAML of plain values",))):
        read_yaml(file(text), "mend it")


def test_yaml_that_merges_and_shares_is_read(file):
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\n"
    value = {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": [{"x": 1, "y": 2}] * 2}
    assert read_yaml(file(text), "mend it") == value
    merged = read_yaml(file(levels("a0: &a0 {x: 1}", "a{i}: &a{i} {{<<: [{before}]}}")), "mend it")
    assert merged["a11"] == {"x": 1}


def test_what_is_not_there_is_what_the_system_says(tmp_path, raises_sentence):
    for read in (read_json, read_yaml):
        with raises_sentence("No such file", str(tmp_path / "absent")):
            read(tmp_path / "absent", "mend it")
        with raises_sentence("Is a directory"):
            read(tmp_path, "mend it")


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["[],", "{},", '{"a":{}},', '"",', "0.0,"])
def test_the_largest_document_takes_less_than_half_a_gigabyte(unit, tmp_path):
    (tmp_path / "a").write_text("[" + unit * ((MAX_JSON - 3) // len(unit)) + "0]")
    program = """
import resource, sys
from pathlib import Path
from ptq4dit_jax.documents import read_json
from ptq4dit_jax.errors import Ptq4ditError
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
try:
    read_json(Path(sys.argv[1]), "mend it")
except Ptq4ditError:
    pass
print(peak() - before)
"""
    out = subprocess.run([sys.executable, "-c", program, tmp_path / "a"], capture_output=True, check=True, timeout=300)
    assert int(out.stdout) < 5e8
