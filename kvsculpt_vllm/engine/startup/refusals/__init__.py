"""What compression does not support: refused at start-up, each with its cause and cure.

Five moments, because more is known at each: the configuration (`configuration.check_config`), the KV cache's groups
(`groups.check_kv_cache_config`), the attention layers of the loaded model (`layers.check_attention_layers`), the
queries that it asks (`layers.check_positions`), and what its device computes (`device.failed_self_test`).
"""
