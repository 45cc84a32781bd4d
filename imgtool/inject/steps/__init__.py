"""The steps of inject, one module a family."""
