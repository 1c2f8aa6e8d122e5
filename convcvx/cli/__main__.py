"""`python -m convcvx.cli`, as `torchrun -m` needs it."""

from convcvx.cli import main

if __name__ == "__main__":
    main()
