"""Post-mortem: what a checkpoint says of the neurons of the network that it holds, with as much proof as there is."""
