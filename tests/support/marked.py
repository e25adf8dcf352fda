"""Parts of a document that a program writes, between two equal marks."""

from collections.abc import Sequence


def with_table(document: str, mark: str, lines: Sequence[str]) -> str:
    """The document with these lines between its marks."""
    before, _, rest = document.partition(mark)
    _, _, after = rest.partition(mark)
    return before + mark + "\n".join(["", *lines, ""]) + mark + after
