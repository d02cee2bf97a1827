"""`python -m tinyvl` is `tinyvl`."""

from tinyvl.cli import main

if __name__ == "__main__":
    main()
