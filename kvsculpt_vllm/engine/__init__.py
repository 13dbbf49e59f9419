"""Everything that touches vLLM. Only `compat` may use vLLM's private attributes."""
