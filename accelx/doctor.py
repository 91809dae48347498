"""The door `python -m accelx.doctor`: what is here, and what does not work."""

import sys

if __name__ == "__main__":
    from accelx.doctors.door import main

    sys.exit(main())
