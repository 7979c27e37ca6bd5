"""What a run would use, looked at or stored ahead of it."""
