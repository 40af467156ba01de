"""The model: patch embedding, decoder, ELVA, on megatron-core layers.

Knows nothing of Hydra, the trainer or a launcher.
"""
