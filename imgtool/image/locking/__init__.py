"""Who has an image open, and how its files are opened and held."""
