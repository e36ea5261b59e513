"""Which keys a query sees, and how positions enter the scores."""
