"""Top floor: the commands, the only place that knows every other package."""
