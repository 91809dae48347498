"""The program: says who it is to its own package."""

import os
import sys

from . import __name__ as package

print(os.environ["RANK"], __name__, package, *sys.argv[1:], flush=True)
sys.stderr.write("to stderr\n")
sys.stdout.write(" 10%\r 90%\r100%\nno end of line")
