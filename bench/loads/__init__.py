"""What is done to a proxy: one module for each kind of load."""
