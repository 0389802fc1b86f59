"""The command line: flags in, one engine call, one result out.

To add a command: write ``engine/NAME.py`` (Config, Result, one function), add its name to
``workspace.COMMANDS`` and its three public names to ``flexctl/__init__.py``, then here a function in
commands.py with an example in its table, and a view in views.py where the plain list of fields does not do.
``make docs`` brings docs/cli.md up to date.
"""
