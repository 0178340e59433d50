"""The one error of reading and preparing data, and the hint for libraries that are not there."""

EXTRA_HINT = 'pip install "gpt4-moe[data]"'


class DataError(ValueError):
    """Data that cannot be read, prepared or used; the message names the file or field and the remedy."""
