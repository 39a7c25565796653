"""What the commands on a user's own models and files do, without the printing: locate and unlearn."""
