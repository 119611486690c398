"""Training: configuration, network, method, loop, checkpoint, evaluation of the encoder."""
