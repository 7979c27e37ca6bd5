"""What serving engines expect of a draft folder: its files, tensors and config, written and read here."""
