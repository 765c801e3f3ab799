"""The federation of `federated.py`, in a deployment of Flower."""
