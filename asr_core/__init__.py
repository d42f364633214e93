"""Ground floor: checkpoint, export graph, artifact folder, audio, tokens and decoding."""
