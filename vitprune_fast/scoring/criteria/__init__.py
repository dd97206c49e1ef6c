"""What can be asked of a unit, one file each with ``CRITERION``; its name is that of the file."""
