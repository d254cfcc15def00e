"""Work beside: it has what this process has, and its result or its error comes back."""

import os
import sys

import pytest

from adafuse.report import beside


def test_two_pieces_of_work_have_what_was_there_and_return_what_they_made():
    seen = {"here": os.getpid()}
    one, two = beside(lambda: (seen["here"], os.getpid())), beside(lambda: seen["here"] + 1)
    assert two() == os.getpid() + 1, "its own work, not the other's"
    here, there = one()
    assert here == os.getpid()
    assert there != here or sys.platform != "linux"


def test_an_error_beside_is_raised_when_the_result_is_asked_for():
    def work():
        raise ValueError("no records found")

    result = beside(work)
    with pytest.raises(ValueError, match="no records found"):
        result()
