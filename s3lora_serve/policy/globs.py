"""Match the policy's globs: `*` and `?` do not match `/`, `**` does."""

import re
from collections.abc import Iterable
from functools import lru_cache


def glob_matches(pattern: str, text: str) -> bool:
    """Whether the whole of `text` matches `pattern`.

    >>> glob_matches("acme/*", "acme/support"), glob_matches("acme/*", "acme/eu/support")
    (True, False)
    """
    return _compiled(pattern).fullmatch(text) is not None


def selects(globs: Iterable[str], module: str) -> bool:
    """Whether one of the globs matches a module's projection or its full name."""
    projection = module.rpartition(".")[2]
    return any(glob_matches(glob, projection) or glob_matches(glob, module) for glob in globs)


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    parts = {"**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.findall(r"\*\*|\*|\?|[^*?]+", pattern)
    return re.compile("".join(parts.get(t, re.escape(t)) for t in tokens), re.DOTALL)
