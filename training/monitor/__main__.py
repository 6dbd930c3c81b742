import sys

from training.monitor.terminal import main

sys.exit(main())
