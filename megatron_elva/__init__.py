"""megatron_elva: the training system for ELVA, a video language model with no vision encoder."""

import warnings

__version__ = "0.1.0"

# megatron-core says this at every import on a machine without a GPU; which layers are used is printed by `layers=auto`
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
