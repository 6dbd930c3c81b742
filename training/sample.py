"""The command `python -m training.sample`; see `training.priors.sample`."""

import sys

from training.priors.sample import main

if __name__ == "__main__":
    sys.exit(main())
