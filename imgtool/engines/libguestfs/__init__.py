"""The libguestfs engine: the guest is read and written inside libguestfs's appliance."""
