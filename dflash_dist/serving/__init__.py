"""From a run to a draft that serving engines load, and the proof that it works."""
