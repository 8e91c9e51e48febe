"""``python -m pimerge`` is the command ``pimerge``."""

from pimerge.cli.app import main

if __name__ == "__main__":
    main()
