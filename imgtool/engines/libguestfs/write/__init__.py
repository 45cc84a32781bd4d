"""Writing through the appliance, and fsck before and after."""
