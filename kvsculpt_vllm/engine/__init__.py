"""Everything that touches vLLM. Only `compat` (and `compat_hooks`) may use vLLM's private attributes."""
