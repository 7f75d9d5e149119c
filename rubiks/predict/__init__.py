"""Using a trained network: what a video shows."""
