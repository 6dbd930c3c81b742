"""The command `python -m training.export_formats`; see `training.publish.export_formats`."""

import sys

from training.publish.export_formats import main

if __name__ == "__main__":
    sys.exit(main())
