"""Conversion both ways, resharding, inspection, verification. Not built yet.

The names of both sides meet in `megatron_elva/model/hf_names.py`.
"""
