"""The command `python -m training.kl`; see `training.losses.kl_control`."""

import sys

from training.losses.kl_control import main

if __name__ == "__main__":
    sys.exit(main())
