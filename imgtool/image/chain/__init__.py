"""What an image is and what it stands on."""
