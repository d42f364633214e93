"""The programs that people use instead, one module each, to be measured against: ``asr_export.bench_peers``.

A module names its ``PEER``, what it ``OPENS`` (the target whose artifacts it loads, or ``checkpoint``), its ``PRECISIONS`` and
the ``ENVIRONMENT`` variable that names the interpreter which has it. It has ``open(folder, precision, threads, scratch)``,
which returns ``hear(samples, language, tokens) -> (text, number of tokens)``; ``tokens`` None means: until it ends by itself.
It raises :class:`ValueError` where it cannot take the model. ``take(samples)``, where there is one, makes of an array what the
peer wants; that time is not counted.

A module runs in an environment where nothing of this project is installed (:mod:`parity.peers._entry`), so it imports nothing
of it; only ``ours`` does.
"""

CHECKPOINT = "checkpoint"
PEERS_PYTHON = "ASR_EXPORT_PEERS_PYTHON"
