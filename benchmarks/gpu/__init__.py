"""Figures of one GPU, a module each: same answers, FP8 curves, training speed, prefill, a profile, decoding.

``benchmarks/gpu.sh`` runs them all. Each runs on a CPU at tiny sizes as well, which shows that it works, no more.
"""
