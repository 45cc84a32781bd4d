"""The direct engine: guests read without an appliance, by readers in a sandbox."""
