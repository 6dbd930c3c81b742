import sys

from training.budget.estimate import main

sys.exit(main())
