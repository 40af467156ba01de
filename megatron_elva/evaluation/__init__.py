"""Benchmarks and their runners. So far: short-answer questions from shards."""
