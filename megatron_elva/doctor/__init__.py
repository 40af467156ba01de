"""``megatron-elva doctor``: what a machine has, what clashes, and what will run on it. The standard library alone."""
