"""All settings as plain values without torch: the source of flags, YAML files and help."""
