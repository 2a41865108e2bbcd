"""What things mean: specs, weights, policies, codecs, the reference and the contract of a backend."""
