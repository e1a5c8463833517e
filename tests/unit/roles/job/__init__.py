"""Tests of the job role; a package, because they share the looks in conftest."""
