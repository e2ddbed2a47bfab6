"""``python -m sharpkit`` is the command line."""

from sharpkit.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
