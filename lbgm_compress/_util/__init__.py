"""Helpers without a subject of their own: units, atomic writes, checks of arguments."""
