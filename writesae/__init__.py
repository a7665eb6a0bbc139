"""Sparse autoencoders for the writes of recurrent language models: a replication suite."""
