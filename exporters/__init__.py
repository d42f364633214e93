"""One module a target: checkpoint in, artifact files out (see asr_core.build.Exporter)."""
