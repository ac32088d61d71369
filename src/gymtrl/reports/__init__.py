"""Terminal and HTML views of what the other rooms found."""
