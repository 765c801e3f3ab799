"""The app that tests run in Flower."""
