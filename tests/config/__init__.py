"""Tests of the config tree."""
