"""The only room that uses vLLM's private attributes and replaces its functions; each entry says when it can go."""
