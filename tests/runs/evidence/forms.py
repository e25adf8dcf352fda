"""Other forms of a prompt, so that a fine-tune learns from what is asked and not from how."""

import re

_OPENING = re.compile(
    r"^(hi|hello|hey)?[,. ]*(can|could|would|will) you( please)? (help me( to)? |tell me )?", re.I
)
_FUNCTION_WORDS = re.compile(
    r"(an?|about|and|any|are|as|at|be|been|but|by|can|could|do|does|for|from|give|had|has|have|how"
    r"|i('d|'m|'ve)?|in|into|is|it|its|it's|me|my|of|on|or|our|please|so|some|tell|that|the|their"
    r"|them|there|these|they|this|to|was|we|were|what|what's|when|which|who|why|will|with|would"
    r"|you|your)"
)
KEYWORDS = 7  # most words of a query


def in_form(prompt: str, number: int) -> str:
    """The prompt in one of four forms: as it is, a command, a query by keywords, careless."""
    return (_same, _command, _keywords, _careless)[number % 4](prompt)


def _same(prompt: str) -> str:
    return prompt


def _command(prompt: str) -> str:
    """The first sentence, without the words of a polite question."""
    first = re.split(r"(?<=[.?!]) ", prompt)[0]
    rest = _OPENING.sub("", first).rstrip("?. ")
    return f"{rest[:1].upper()}{rest[1:]}."


def _keywords(prompt: str) -> str:
    words = re.findall(r"[\w'-]+", prompt.lower())
    return " ".join([word for word in words if not _FUNCTION_WORDS.fullmatch(word)][:KEYWORDS])


def _careless(prompt: str) -> str:
    return re.sub(r"[^\w' ]", "", prompt.lower())
