"""Programs that no package has: run as processes of their own, so that their CPU is nobody's account."""
