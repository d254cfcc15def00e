"""AdaFuse, replicated: what a dynamic LoRA adapter costs at inference, and what it buys.

Start with config.py; every file names the next one. The command line is scripts/run.py.
"""

__version__ = "0.1.0"
