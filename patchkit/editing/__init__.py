"""From facts to weight updates: recipes, contexts, value targets, keys and the loop that joins them."""
