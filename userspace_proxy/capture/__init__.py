"""How traffic for portals reaches proxy ports: one file a way, all behind `capture.base.Capture`."""
