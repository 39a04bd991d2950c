"""``python -m transcnn``, as ``torchrun -m transcnn train ...`` needs it."""

import sys

from .cli import main

sys.exit(main())
