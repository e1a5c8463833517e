"""A package that is installed from its source."""

ANSWER = 42
