"""Linear algebra, rotations and updates: tensors in, tensors out; no model, file or device is known here."""
