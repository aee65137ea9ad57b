"""fit() and its parts, in plain torch and torch.distributed."""
