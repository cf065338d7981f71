import sys

from qpsft.cli import main

sys.exit(main())
