"""The one error type that users see: a sentence that names the offending value and the remedy."""


class Ptq4ditError(ValueError):
    """A user's mistake or an unusable input; the message is one complete sentence."""
