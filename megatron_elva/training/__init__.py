"""The loop, stages, checkpoints, signals and hangs, metrics, FLOPs accounting, tracking in MLflow."""
