"""What the command line does, without its parsing: one module per command."""
