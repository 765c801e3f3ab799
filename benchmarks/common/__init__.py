"""Modules that the commands in benchmarks/ share."""
