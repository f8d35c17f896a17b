"""`python -m spmd_train`: the same as the console script `spmd-train`."""

import sys

from spmd_train.cli.main import main

sys.exit(main())
