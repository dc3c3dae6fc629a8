"""What only the published files and the official demo need."""
