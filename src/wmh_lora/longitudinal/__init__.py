"""Two or more visits of one person: what changed between them."""
