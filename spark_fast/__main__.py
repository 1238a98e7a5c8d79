"""`python -m spark_fast` is the command `spark-fast`."""

import sys

from spark_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
