"""Looking for files in a guest: by what is known of them, and by what is in them."""
