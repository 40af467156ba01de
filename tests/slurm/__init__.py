"""What needs a real Slurm of several nodes: the cluster (`cluster.py`), the launcher on it, and every failure."""
