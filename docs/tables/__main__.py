"""`make docs`."""

from . import main

main()
