"""Runs where vLLM takes its arguments and requests: flags, the engine's configuration, refusals, checks."""
