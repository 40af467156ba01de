"""Tests of the launcher and its estimates."""
