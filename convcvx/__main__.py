"""`python -m convcvx`."""

from convcvx.cli import main

if __name__ == "__main__":
    main()
