"""`python -m recipes.cli` is the command `cohort`."""

import sys

from recipes.cli import main

sys.exit(main())
