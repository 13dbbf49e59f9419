"""The algorithm: from a span's keys and values to fewer free pairs. Torch only, never imports vLLM."""
