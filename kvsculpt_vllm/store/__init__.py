"""Segments on disk or in a bucket: files that outlive a server and are shared by several. Never imports vLLM."""
