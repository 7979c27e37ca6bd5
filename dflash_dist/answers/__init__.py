"""The target writes a data set's answers again, in this process or through a server."""
