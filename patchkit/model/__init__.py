"""A transformers model as patchkit sees it: its editable weights, spans of its layers, hooks, loading."""
