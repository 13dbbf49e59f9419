"""Everything that touches vLLM, a room for each of its processes; docs/architecture.md says which file runs where."""
