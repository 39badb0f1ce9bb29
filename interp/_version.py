"""The one place that holds the version: the build, the CLI, stored traces and the changelog's test read it here."""

__version__ = "0.1.0"
