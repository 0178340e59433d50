"""The scaling ladder: small replicas, a law fitted to them, a prediction, the replica that it was of."""
