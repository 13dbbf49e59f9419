"""What a compressed cache costs in answers: the model runs in transformers, vLLM is not needed."""
