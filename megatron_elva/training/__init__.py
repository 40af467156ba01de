"""The loop, stages, checkpoints, metrics, FLOPs accounting.

Tracking in MLflow has its place here and is not built yet.
"""
