"""Documents, tokens, packing and samples."""
