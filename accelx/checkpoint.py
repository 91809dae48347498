"""The door `python -m accelx.checkpoint`: what lies in a folder of checkpoints."""

import sys

if __name__ == "__main__":
    from accelx.checkpoints.door import main

    sys.exit(main())
