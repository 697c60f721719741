"""Run the command line as ``python -m neuronscope``, for when the script is not on the path."""

from __future__ import annotations

import sys

from neuronscope.cli import main

if __name__ == "__main__":
    sys.exit(main())
