"""The shared engine: one module a command, each with its Config, its Result and one function."""
