"""`python -m chatfine`, where the console script is not on the path (Windows, torchrun)."""

import sys

from chatfine.cli import main

sys.exit(main())
