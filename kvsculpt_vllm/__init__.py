"""vLLM plugin that replaces the KV cache of a prompt by fewer key/value pairs giving the same attention."""

__version__ = "0.1.0"
