"""What plain text says of a model: second moments of keys and gradients of the loss, computed once and kept."""
