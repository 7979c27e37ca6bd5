"""How many tokens a pass a draft gains, how fast, and why it disappoints."""
