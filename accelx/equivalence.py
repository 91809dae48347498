"""The door `python -m accelx.equivalence`: does a run depend on where it runs?"""

import sys

if __name__ == "__main__":
    from accelx.equivalences.door import main

    sys.exit(main())
