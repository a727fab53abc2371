"""`python -m jquant`: the command line where no script is on the path."""

from jquant.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
