"""Plans for all adapters of running servers, made in the background: `s3lora planner`."""
