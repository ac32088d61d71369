"""Terminal views of what the other rooms found."""
