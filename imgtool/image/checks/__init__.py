"""What is wrong or doubtful with images, and what else stands on them."""
