"""megatron_elva: the training system for ELVA, a video language model with no vision encoder."""

__version__ = "0.1.0"
