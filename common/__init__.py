"""What the stages share: media files in and out, one subject a file."""
