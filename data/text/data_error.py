"""The error of a file that cannot be used as data."""


class DataError(ValueError):
    """A file that cannot be used as data."""
