"""Files on disk and on the Hub: written atomically, checkpoints read tensor by tensor."""
