"""The GPU kernels, and beside each what it means: naive.py says it in PyTorch, README.md derives and measures it."""
