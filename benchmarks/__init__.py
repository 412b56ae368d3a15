"""Programs that measure Pivotune: `python -m benchmarks.step`, `.cross_entropy`, `.profile`. See docs/performance.md."""
