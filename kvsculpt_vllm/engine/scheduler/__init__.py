"""Runs in the engine core's process: when a prompt is compressed, into which blocks, and which come free."""
