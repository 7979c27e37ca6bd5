"""A run's draft as serving engines load it, and what they would do wrong with a draft folder."""
