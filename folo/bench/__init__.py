"""Benchmarks of the engine: `folo bench NAME`. Clocks live here, never in the core."""
