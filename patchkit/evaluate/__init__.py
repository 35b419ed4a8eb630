"""What a patch did: metrics, gates and generated text."""
