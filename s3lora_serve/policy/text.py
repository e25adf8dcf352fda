"""Names and paths must be text: what UTF-8 cannot encode, no answer, page or engine can carry."""

from s3lora_serve.errors import NotText


def check_text(*chosen: str) -> None:
    """Check that UTF-8 can encode what a tenant chose.

    Raises:
        NotText: it holds lone surrogates.
    """
    for text in chosen:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise NotText(f"UTF-8 cannot encode {text[error.start : error.end][:40]!r}") from None
