"""fit() and what it is made of; plain torch and torch.distributed."""
