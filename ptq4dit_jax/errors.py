"""The one error type that users see: a sentence that names the offending value and the remedy."""

#: Longer messages are cut in the middle, since files choose the names in them.
_LONGEST = 10_000


def printable(text: str) -> str:
    """Returns text on one line, with escapes such as ``\\x1b`` for unprintable characters, which could act on a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


class Ptq4ditError(ValueError):
    """A user's mistake or an unusable input; the message is one complete sentence.

    Others choose the names of files, tensors and keys in messages. Whatever these contain, the message is one printable line,
    not much longer than :data:`_LONGEST`.
    """

    def __init__(self, message: str) -> None:
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]}...{message[-_LONGEST // 2 :]}"
        super().__init__(printable(message))
