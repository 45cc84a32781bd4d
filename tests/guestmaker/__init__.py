"""Makes the guests that the tests look into: one module a family of guests."""
