"""The patch: its file format, history, attachment to a live model, and solving again without some facts."""
