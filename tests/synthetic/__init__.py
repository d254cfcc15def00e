"""Makers that the tests share: configurations, adapters, operands of kernels, records from made-up numbers."""
