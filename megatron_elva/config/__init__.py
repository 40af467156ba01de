"""The config tree: frozen dataclasses, composition from ``configs/`` and validation. Needs no torch.distributed."""
