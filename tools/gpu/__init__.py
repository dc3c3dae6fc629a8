"""What can be measured on a GPU alone: see README.md here."""
