"""What the proxy tells people and machines over HTTP: health, metrics, configuration."""
