"""What a build says of itself: data, tables, a page, pictures."""
