"""The guest as the appliance sees it: reading."""
