"""What watching costs. ``python -m benchmarks`` prints every table; see docs/performance.md for what they say."""
