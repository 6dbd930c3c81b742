import sys

from training.demo.command import main

sys.exit(main())
