"""Proxy sockets: they accept the clients of one service port and relay to its endpoints."""
