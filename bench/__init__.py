"""What this proxy costs, measured beside its peers. `python -m bench --help` says how to run it."""
