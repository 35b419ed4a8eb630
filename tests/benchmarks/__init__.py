"""Programs that measure patchkit against a plain implementation of the published procedure."""
