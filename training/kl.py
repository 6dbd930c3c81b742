"""The command `python -m training.kl`; see `training.losses.kl_simulation`."""

import sys

from training.losses.kl_simulation import main

if __name__ == "__main__":
    sys.exit(main())
