"""What adapters and the tiny backbone are trained on, and the fitting itself."""
