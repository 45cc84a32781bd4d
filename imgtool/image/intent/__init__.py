"""What work on an image writes down before it begins, and what that says to who comes after."""
