"""Talking to a patched model: one model in memory, patches chosen for each answer, text as it is generated."""
