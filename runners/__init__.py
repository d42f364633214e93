"""One module a runtime: artifact in, encoder states, logits and tokens out (see runners.base)."""
