"""``python -m megatron_elva`` is ``megatron-elva``."""

import sys

from megatron_elva.cli import main

if __name__ == "__main__":
    sys.exit(main())
