"""Files of the guest that the steps read and write."""
