"""The parts of the network and where their weights come from."""
