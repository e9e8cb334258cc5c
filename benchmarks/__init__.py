"""Speed and memory as ratios against named baselines, measured side by side in one run: `python -m benchmarks`."""
