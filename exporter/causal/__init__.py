"""Causal language models: a folder of weights -> one decoder graph with a KV cache -> a bundle that generates."""
