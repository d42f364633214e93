"""Makes checkpoints smaller: every method reads one and writes an ordinary one, whatever it does in between."""
