"""Long runs that try to break what docs/trust.md promises; `make test-slow` runs them, and prints what they counted."""
