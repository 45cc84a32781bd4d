"""What the host trusts: it starts the worker, and believes nothing that it hears."""
