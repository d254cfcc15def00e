"""Measurement: calibration, checks, interleaved rounds, and what is timed in them."""
