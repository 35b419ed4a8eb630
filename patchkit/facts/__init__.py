"""Fact files, and facts as token sequences."""
