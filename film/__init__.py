"""What films need around the model: which files, their sound's level, redoing a moment, pages."""
