"""Production clients, one module a target that has one: how its users transcribe with the artifact as it is."""
