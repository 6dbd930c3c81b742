import sys

from training.budget.plan import main

sys.exit(main())
