"""inject: what a guest is to be like, as steps that are planned on its files and then written."""
