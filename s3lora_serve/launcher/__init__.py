"""Behind `s3lora serve` and `s3lora doctor`: environment checks, vLLM's command and process."""
