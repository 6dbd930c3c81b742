"""The command `python -m training.compare_priors`; see `training.priors.compare`."""

import sys

from training.priors.compare import main

if __name__ == "__main__":
    sys.exit(main())
