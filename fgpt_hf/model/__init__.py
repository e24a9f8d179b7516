"""Define, load, save and adapt the network."""
