"""The routed expert MLP: gather, product, activation, product, weighted sum; forward and backward."""
