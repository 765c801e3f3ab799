"""Handwritten digits, learned with Flower and compressed updates."""
