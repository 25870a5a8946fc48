"""Several processes that relay on the same proxy ports, and the control process's side of them."""
