"""Compare every artifact with the PyTorch reference, each in its own process."""
