"""``python -m dali_pipelines.prepare``."""

import sys

from dali_pipelines.prepare.cli import main

if __name__ == "__main__":
    sys.exit(main())
