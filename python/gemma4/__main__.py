"""`python -m gemma4` is the command `gemma4`."""

import sys

from .cli import main

sys.exit(main())
