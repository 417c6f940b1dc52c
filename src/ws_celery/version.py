"""The version of the package, for setup.cfg and the command line."""

__version__ = "0.1.0.dev0"
