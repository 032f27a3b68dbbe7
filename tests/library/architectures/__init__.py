"""Which architectures of transformers the methods run on: tiny hosts, what is asked of each, the committed table."""
