"""Helpers: units, atomic writes, checks of arguments, names and saved states of both ends."""
