"""The one error type that users see: a sentence that names the offending value and the remedy."""

#: A message is cut in its middle beyond this: the names in it are those that a file has chosen.
_LONGEST = 10_000


def printable(text: str) -> str:
    """The text on one line, with escapes such as ``\\x1b`` for what is no printable character and could act on a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


class Ptq4ditError(ValueError):
    """A user's mistake or an unusable input; the message is one complete sentence.

    Names of files, tensors and keys come into messages as others chose them. Whatever they hold, the message is one printable
    line, and not much longer than :data:`_LONGEST`.
    """

    def __init__(self, message: str) -> None:
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]}...{message[-_LONGEST // 2 :]}"
        super().__init__(printable(message))
