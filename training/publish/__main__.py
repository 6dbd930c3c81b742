import sys

from training.publish.stage import main

sys.exit(main())
