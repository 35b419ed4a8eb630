"""One run, from new facts to a patch: prepared before any work is done, executed, and written into the history."""
