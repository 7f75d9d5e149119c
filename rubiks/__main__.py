"""python -m rubiks: the `rubiks` command."""

from rubiks.cli.main import main

if __name__ == "__main__":
    main()
