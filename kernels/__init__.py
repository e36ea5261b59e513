"""How attention over given keys is computed on one device."""
