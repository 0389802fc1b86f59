"""The command line: flags in, one engine call, one result out.

To add a command: write ``engine/NAME.py`` (Config, Result, one function) and a row in ``flexctl/commands.py``.
To add an option: write a field of a Config. ``make docs`` then brings docs/cli.md and the types of the package's
names up to date. A view in views.py is needed only where the plain list of fields does not do.
"""
