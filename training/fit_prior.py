"""The command `python -m training.fit_prior`; see `training.priors.fit`."""

import sys

from training.priors.fit import main

if __name__ == "__main__":
    sys.exit(main())
