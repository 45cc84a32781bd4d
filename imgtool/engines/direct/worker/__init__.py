"""What runs confined, with a hostile guest in its hands."""
