"""The sequential-editing benchmark."""
