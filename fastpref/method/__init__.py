"""The method: the table of algorithms, losses, settings, errors."""
