"""Training and verifying a model over many processes, on torch.distributed: applied from outside of the model."""
