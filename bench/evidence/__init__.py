"""What recipes keep of a model, beside others and beside training from scratch: `make evidence`."""
