"""Text that others chose, made fit to be shown on pages, in answers and in logs."""


def printable(text: str) -> str:
    r"""The text with an escape in the place of each character that cannot be shown.

    UTF-8 cannot encode lone surrogates, and a line break would look like another line of a log.

    >>> printable("a\nb \ud800")
    'a\\nb \\ud800'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def encodable(text: str) -> str:
    """The text with an escape in the place of each lone surrogate; other characters stay."""
    return text.encode("utf-8", "backslashreplace").decode()
