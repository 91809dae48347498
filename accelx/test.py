"""The door `python -m accelx.test`: whether this installation does what it should."""

import sys

if __name__ == "__main__":
    from accelx.doctors.selftest import main

    sys.exit(main())
