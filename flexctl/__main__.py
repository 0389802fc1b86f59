"""``python -m flexctl`` is the command line."""

from flexctl.cli.app import run

if __name__ == "__main__":
    run()
