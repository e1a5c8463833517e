"""The one error that a user of the lab sees."""

from __future__ import annotations


class LabError(Exception):
    """One sentence: what is wrong, where, and what to do about it."""
