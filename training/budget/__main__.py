import sys

from training.budget.command import main

sys.exit(main())
