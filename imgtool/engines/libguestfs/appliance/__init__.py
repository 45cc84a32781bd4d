"""The appliance: started, saved, watched."""
