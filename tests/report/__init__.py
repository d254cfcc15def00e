"""Tests of the report: a package, so that its conftest and its names are apart from those above."""
