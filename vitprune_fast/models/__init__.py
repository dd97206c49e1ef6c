"""Models by name: of timm, from a folder or from a checkpoint."""
