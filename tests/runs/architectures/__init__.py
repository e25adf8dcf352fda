"""What vLLM serves of models and adapters of many kinds, guarded and stock."""
