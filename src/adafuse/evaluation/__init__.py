"""Accuracy: the tasks, and lm-eval through the forward and the strategies that are also timed."""
