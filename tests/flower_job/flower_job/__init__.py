"""What the tests run in Flower."""
