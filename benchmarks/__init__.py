"""Tables of operations and times. Each module is a command: ``python -m benchmarks.flops``, ``... .merging``."""
