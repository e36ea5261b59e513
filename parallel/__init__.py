"""Where tokens live, and how keys and values reach queries."""
