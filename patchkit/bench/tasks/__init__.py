"""Tasks for lm-eval that come with patchkit."""
