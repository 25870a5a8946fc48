"""A userspace proxy for Kubernetes Services: TCP and UDP, from manifests, with no kernel load balancing."""

__version__ = "0.1.0"
