"""`python -m s3lora_serve`: the command line where the `s3lora` script is not on the path."""

from s3lora_serve.cli import app

app()
