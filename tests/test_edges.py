"""Whatever a reader raises ends in one sentence, and strings out of files cannot act on a terminal."""

import errno

import pytest

from ptq4dit_jax.edges import edge, shown, whole_number
from ptq4dit_jax.errors import Ptq4ditError


@pytest.mark.parametrize(
    "raised",
    [
        KeyError("x"),
        RecursionError(),
        IndentationError("y"),
        NotImplementedError(),
        UnicodeDecodeError("utf-8", b"", 0, 1, "z"),
    ],
)
def test_every_exception_becomes_a_sentence_with_its_remedy(raised):
    with (
        pytest.raises(Ptq4ditError, match=r"^Cannot read rows\.npz: write it again with NumPy\.$") as caught,
        edge("rows.npz", "write it again with NumPy"),
    ):
        raise raised
    assert caught.value.__cause__ is raised


def test_what_the_reader_says_itself_stays():
    said = Ptq4ditError("The label 12 is beyond the 10 classes.")
    with pytest.raises(Ptq4ditError) as caught, edge("rows.npz"):
        raise said
    assert caught.value is said


@pytest.mark.parametrize("raised", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_little_memory_is_not_called_damage(raised):
    with pytest.raises(Ptq4ditError, match="too little free memory") as caught, edge("rows.npz"):
        raise raised
    assert "damaged" not in str(caught.value)


def test_the_system_has_its_say():
    with pytest.raises(Ptq4ditError, match="Permission denied"), edge("rows.npz"):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_interrupts_pass():
    with pytest.raises(KeyboardInterrupt), edge("rows.npz"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("text", ["a\nb", "\x1b]0;title\x07", "\x9b31m", "\u2028", "\u202egnp", "\ud800"])
def test_shown_strings_are_one_printable_line(text):
    assert shown(text).isprintable()
    assert "\n" not in shown(text)


def test_shown_keeps_letters_of_every_script_and_cuts_what_is_long():
    assert shown("größe/模型") == "größe/模型"
    assert len(shown("x" * 10**6)) <= 120


def test_what_is_no_string_is_named_by_its_type():
    class Slow:
        def __str__(self):
            raise AssertionError("formatted")

    assert shown(Slow()) == "a Slow"


@pytest.mark.parametrize("name", ["\x1b[2J\x1b]0;owned\x07", "a\nError: b", "\u202egnp", "\ud800", "\x9b0m"])
def test_no_message_carries_control_characters(name):
    assert str(Ptq4ditError(f"The tensor {name} is odd.")).isprintable()
    with pytest.raises(Ptq4ditError) as caught, edge(name):
        raise KeyError
    assert str(caught.value).isprintable()


def test_a_message_keeps_its_beginning_and_its_remedy():
    message = str(Ptq4ditError("The file " + "x" * 10**6 + " is odd; download it again."))
    assert message.startswith("The file ")
    assert message.endswith("; download it again.")
    assert len(message) < 11_000


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("0042", 42),
        (str(2**63 - 1), 2**63 - 1),
        ("9" * 5000, None),
        ("-1", None),
        ("²", None),
        ("٣", None),
        ("", None),
    ],
)
def test_whole_numbers(text, number):
    assert whole_number(text) == number
